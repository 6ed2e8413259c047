"""The ``optimizer`` section: the update rule, its learning rate and the schedule over epochs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sweeper.config.base import Section

OptimizerName = Literal["sgd", "momentum", "nesterov", "adam", "adamw", "adadelta", "rmsprop"]


class ConstantSchedule(Section):
    """The learning rate stays as it is."""

    name: Literal["constant"] = "constant"


class ExponentialSchedule(Section):
    """The learning rate is multiplied by ``gamma`` after every epoch."""

    name: Literal["exponential"]
    gamma: float = Field(default=0.95, gt=0, le=1)


class CosineSchedule(Section):
    """The learning rate falls along half a cosine over all epochs, from ``lr`` to ``min_lr``."""

    name: Literal["cosine"]
    min_lr: float = Field(default=0.0, ge=0)


class PlateauSchedule(Section):
    """The learning rate is multiplied by ``factor`` when ``monitor`` stalls ``patience`` epochs.

    ``min_lr`` is the lowest it falls to.
    """

    name: Literal["plateau"]
    factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=10, ge=0)
    monitor: Literal["val_loss", "val_accuracy"] = "val_loss"
    min_lr: float = Field(default=0.0, ge=0)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


ScheduleConfig = Annotated[
    ConstantSchedule | ExponentialSchedule | CosineSchedule | PlateauSchedule,
    Field(discriminator="name"),
    BeforeValidator(_named),
]
"""A schedule's name, or a mapping with ``name`` and its own fields."""


class OptimizerConfig(Section):
    """An optimizer of ``torch.optim`` by the names the reports use.

    ``sgd`` is plain gradient descent, ``momentum`` SGD with momentum, ``nesterov`` the same with
    Nesterov's. ``momentum`` is SGD's momentum, and Adam's and AdamW's beta1 (report R4, section
    4.5); without it 0.9, and 0 for RMSprop. ``sgd`` and ``adadelta`` have none and ignore it.
    ``lr`` is the learning rate before any schedule. ``weight_decay`` is decoupled for AdamW and
    added to the gradient otherwise. ``beta2`` is Adam's and AdamW's. ``eps`` is added to
    denominators (None: the optimizer's own). ``clip_norm`` bounds the gradient's norm (None: not
    at all). ``schedule`` is how the learning rate changes over the epochs.
    """

    name: OptimizerName = "adam"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float | None = Field(default=None, gt=0)
    clip_norm: float | None = Field(default=None, gt=0)
    schedule: ScheduleConfig = ConstantSchedule()

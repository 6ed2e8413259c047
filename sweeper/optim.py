"""Optimizers, learning-rate schedules and losses, by the names of the configuration.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch._dynamo  # the first optimizer would import it: 1.4 s of the first trial's time
from torch import Tensor, nn
from torch.nn import functional

from sweeper.config.optimizer import (
    CosineSchedule,
    ExponentialSchedule,
    OptimizerConfig,
    PlateauSchedule,
)
from sweeper.config.train import TrainConfig
from sweeper.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits_BK, labels_B)``."""


# --- optimizers -------------------------------------------------------------------------------


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], *, capturable: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over those ``parameters`` that require a gradient.

    SGD, Adam and AdamW run as one fused kernel a step. On the CPU that takes 0.2 to 1.1 times as
    long as torch's default (measured with torch 2.15: Adam on an MLP 343 µs against 927).

    The state is there from the beginning, as zeros. torch would make it in the first step: where
    loss scaling skips that one, a momentum of whatever the memory held; where a CUDA graph captures
    it, memory that every replay zeroes. With ``capturable`` the step may be captured, the first one
    already: the learning rate is a float32 tensor that :func:`set_lr` writes.

    Raises UsageError where there is nothing to train.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UsageError("the model must have parameters that require a gradient, but has none")
    lr: float | Tensor = config.lr
    if capturable:
        lr = torch.tensor(config.lr, dtype=torch.float32, device=trained[0].device)
    optimizer = _optimizer(config, trained, lr, graph_safe=capturable and trained[0].is_cuda)
    _allocate_state(optimizer)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter], lr: float | Tensor, *, graph_safe: bool
) -> torch.optim.Optimizer:
    """``graph_safe`` is torch's ``capturable``, which it refuses on a CPU."""
    momentum = 0.9 if config.momentum is None else config.momentum
    shared: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay}
    eps: dict[str, Any] = {} if config.eps is None else {"eps": config.eps}
    match config.name:
        case "sgd":
            return torch.optim.SGD(parameters, **shared, fused=True)
        case "momentum" | "nesterov":
            # torch refuses Nesterov without momentum, which is plain SGD
            nesterov = config.name == "nesterov" and momentum > 0
            return torch.optim.SGD(
                parameters, **shared, momentum=momentum, nesterov=nesterov, fused=True
            )
        case "adam" | "adamw":
            rule = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
            betas = (momentum, config.beta2)
            return rule(parameters, **shared, **eps, betas=betas, fused=True, capturable=graph_safe)
        case "adadelta":
            return torch.optim.Adadelta(
                parameters, **shared, **eps, foreach=True, capturable=graph_safe
            )
        case "rmsprop":
            return torch.optim.RMSprop(
                parameters,
                **shared,
                **eps,
                momentum=config.momentum or 0.0,
                foreach=True,
                capturable=graph_safe,
            )


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state by a step that changes nothing, then put it to zero.

    Without gradient and weight decay every rule here moves the parameters by nothing, and a
    momentum that is zero acts on the first step as one that is not there.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    gradients = [p.grad for p in parameters]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings():  # torch's, that a capturable step runs uncaptured: it is meant
        warnings.simplefilter("ignore", UserWarning)
        optimizer.step()
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


# --- schedules --------------------------------------------------------------------------------


class Schedule(Protocol):
    """The learning rate of each epoch. ``step`` ends an epoch; ``lr`` is for the coming one."""

    @property
    def lr(self) -> float: ...

    def step(self, metrics: Mapping[str, float]) -> None: ...

    def state_dict(self) -> dict[str, float | None]: ...

    def load_state_dict(self, state: Mapping[str, float | None]) -> None: ...


def make_schedule(config: OptimizerConfig, epochs: int) -> Schedule:
    """The schedule of a training of ``epochs`` epochs, which starts at ``config.lr``."""
    lr, schedule = config.lr, config.schedule
    match schedule:
        case PlateauSchedule():
            return _Plateau(config=schedule, lr=lr)
        case ExponentialSchedule(gamma=gamma):
            return _ByEpoch(lambda epoch: lr * gamma**epoch)
        case CosineSchedule(min_lr=min_lr):
            return _ByEpoch(lambda epoch: _cosine(min(epoch / epochs, 1.0), lr, min_lr))
        case _:
            return _ByEpoch(lambda epoch: lr)


def _cosine(share: float, lr: float, min_lr: float) -> float:
    """Half a cosine from ``lr`` at 0 to ``min_lr`` at 1 of the training."""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * share)) / 2


@dataclass(slots=True)
class _ByEpoch:
    """A schedule that depends on the number of epochs done alone."""

    lr_at: Callable[[int], float]
    epoch: int = 0

    @property
    def lr(self) -> float:
        return self.lr_at(self.epoch)

    def step(self, metrics: Mapping[str, float]) -> None:
        self.epoch += 1

    def state_dict(self) -> dict[str, float | None]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self.epoch = int(state["epoch"] or 0)


@dataclass(slots=True, kw_only=True)
class _Plateau:
    """torch's ``ReduceLROnPlateau`` with its defaults: relative threshold 1e-4, no cooldown.

    ``stalled`` counts the epochs without improvement since the best one or the last reduction. A
    reduction by less than 1e-8 is not made, as in torch.
    """

    config: PlateauSchedule
    lr: float
    best: float | None = None
    stalled: int = 0

    def step(self, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.config.monitor)
        if value is None:
            raise UsageError(
                f"the plateau schedule needs {self.config.monitor} after every epoch, but this "
                f"one measured {', '.join(metrics) or 'nothing'}"
            )
        if self._improves(value):
            self.best, self.stalled = value, 0
        else:
            self.stalled += 1
        if self.stalled > self.config.patience:
            self.stalled = 0
            reduced = max(self.lr * self.config.factor, self.config.min_lr)
            if self.lr - reduced > 1e-8:
                self.lr = reduced

    def _improves(self, value: float) -> bool:
        """Never with NaN."""
        higher = self.config.monitor == "val_accuracy"
        best = self.best
        if best is None:
            best = -math.inf if higher else math.inf
        return value > best * (1 + 1e-4) if higher else value < best * (1 - 1e-4)

    def state_dict(self) -> dict[str, float | None]:
        return {"lr": self.lr, "best": self.best, "stalled": self.stalled}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        self.lr = float(state["lr"] or 0.0)
        self.best = state["best"]
        self.stalled = int(state["stalled"] or 0)


# --- losses -----------------------------------------------------------------------------------


def make_loss(config: TrainConfig, classes: int, *, per_example: bool = False) -> Loss:
    """The loss of logits [B, K] against labels [B]: a number, or [B] with ``per_example``.

    The mean of the latter is the former. Computed in float32 at least. ``mse`` compares the logits
    with one-hot targets and takes the mean over examples and classes; label smoothing mixes the
    targets with 1 / K. Both stay on the device and run under vmap and in CUDA graphs.
    """
    smoothing = config.label_smoothing
    reduction = "none" if per_example else "mean"

    def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        return functional.cross_entropy(
            _widened(logits_BK), labels_B, label_smoothing=smoothing, reduction=reduction
        )

    def mse(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        logits_BK = _widened(logits_BK)
        # functional.one_hot looks at the labels on the host, which neither vmap nor a graph allows
        is_label_BK = labels_B[:, None] == torch.arange(classes, device=labels_B.device)
        target_BK = is_label_BK.to(logits_BK.dtype) * (1 - smoothing) + smoothing / classes
        squared_BK = (logits_BK - target_BK).square()
        return squared_BK.mean(dim=-1) if per_example else squared_BK.mean()

    return cross_entropy if config.loss == "cross_entropy" else mse


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

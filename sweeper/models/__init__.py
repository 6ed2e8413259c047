"""The models: one file a family, one dictionary of them, and :func:`build`.

A model maps float images x_BCHW [B, channels, height, width] to logits [B, classes]. The support
vector machine is none of them; see :mod:`sweeper.models.svm`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from sweeper.config.data import DataShape
from sweeper.config.model import Custom as CustomConfig
from sweeper.config.model import ModelConfig
from sweeper.config.model import Svm as SvmConfig
from sweeper.config.model import Timm as TimmConfig
from sweeper.errors import UsageError
from sweeper.models.cnn import Cnn
from sweeper.models.custom import check_custom, custom
from sweeper.models.init import initialise
from sweeper.models.mixer import Mixer
from sweeper.models.mlp import Mlp
from sweeper.models.resnet import resnet18
from sweeper.models.timm import timm_model
from sweeper.models.vit import Vit, sinusoidal_encoding

__all__ = ["MODELS", "build", "check_custom", "parameter_count", "sinusoidal_encoding"]

MODELS: Final[dict[str, Callable[[Any, DataShape], nn.Module]]] = {
    "mlp": Mlp,
    "mixer": Mixer,
    "cnn": Cnn,
    "resnet18": resnet18,
    "vit": Vit,
    "timm": timm_model,
}
"""By the ``name`` of the configuration, which each of them takes with the shape of the data."""


def build(config: ModelConfig, shape: DataShape, *, seed: int | None = None) -> nn.Module:
    """Build a model for data of ``shape`` on torch's current default device.

    Weights are drawn on the CPU, so a seed gives the same ones on every device, and the state of
    the caller's random generators is left as it was; without ``seed`` the CPU's generator is used
    as it stands. Under ``torch.device("meta")`` nothing is drawn and no pretrained weights loaded.

    Raises UsageError where the configuration does not fit the data, MissingExtraError where timm
    is needed and not installed, OutOfReachError where pretrained weights cannot be had.
    """
    if isinstance(config, SvmConfig):
        raise UsageError(
            "model.name svm is fitted by sweeper.models.svm.SvmModel; it is no torch module"
        )
    try:
        config.check(shape)
    except ValueError as error:
        raise UsageError(f"model: {error}") from error
    device = torch.get_default_device()
    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(_drawn_by(seed))
        stack.enter_context(torch.device("meta" if device.type == "meta" else "cpu"))
        model = _construct(config, shape)
        initialise(model, config.init)
    return model if device.type == "meta" else model.to(device)


@contextmanager
def _drawn_by(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, and those that a model of one's own may draw from: Python's and
    NumPy's. All are put back at the end."""
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


def parameter_count(config: ModelConfig, shape: DataShape) -> int:
    """How many numbers training changes; 0 for a support vector machine.

    Counted on the meta device, without memory or random numbers. A model of your own that cannot
    be built there is built on the CPU. Raises what :func:`build` raises.
    """
    if isinstance(config, SvmConfig):
        return 0
    try:
        with torch.device("meta"):
            model = build(config, shape)
    except UsageError:
        if not isinstance(config, CustomConfig):
            raise
        with torch.device("cpu"):
            model = build(config, shape, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _construct(config: ModelConfig, shape: DataShape) -> nn.Module:
    if isinstance(config, CustomConfig):
        model = custom(config, shape)
        _check_output(model, config.name, shape)
        _check_in_training(model, config.name, shape)
        _check_state(model, config.name)
        return model
    model = MODELS[config.name](config, shape)
    if isinstance(config, TimmConfig):
        hint = "; set model.image_size to the size that the architecture is made for"
        _check_output(model, config.architecture, shape, hint=hint)
    return model


def _check_in_training(model: nn.Module, name: str, shape: DataShape) -> None:
    """As :func:`_check_output`, of a copy in training mode, as that may change running statistics.

    A model that cannot be copied is not tried.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception:  # noqa: BLE001 - whatever a class of somebody else's raises
        return
    with _drawn_by(0):  # so that nobody else's draws change
        _check_output(twin, name, shape, training=True)


def _check_state(model: nn.Module, name: str) -> None:
    """Raise UsageError where the state is not made of tensors, which checkpoints and best weights
    are."""
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"model {name}: its state_dict() must hold tensors only, but {key!r} is a "
                f"{type(value).__name__}; let get_extra_state return a tensor"
            )


def _check_output(
    model: nn.Module, name: str, shape: DataShape, *, training: bool = False, hint: str = ""
) -> None:
    """Raise UsageError unless two blank images of ``shape`` give logits [2, classes]."""
    images_BCHW = torch.zeros(2, shape.channels, shape.height, shape.width)
    before = model.training
    model.train(training)
    must = f"model {name} must map images {list(images_BCHW.shape)} to logits [2, {shape.classes}]"
    must += " in training mode too" if training else ""
    try:
        with torch.no_grad():
            logits = model(images_BCHW)
    except Exception as error:
        raise UsageError(f"{must}, but raised {type(error).__name__}: {error}{hint}") from error
    model.train(before)
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != [2, shape.classes]:
        raise UsageError(f"{must}, but it gave {found}")

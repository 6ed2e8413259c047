"""Numerical precision of a trial (``train.precision``).

================  =============================  ================  ==============
``precision``     model and images               autocast          loss scaling
================  =============================  ================  ==============
``float32``       float32                        –                 –
``bfloat16``      float32                        bfloat16          –
``float16``       float32                        float16           ``GradScaler``
``float64``       float64                        –                 –
``auto``          bfloat16 on CUDA, else float32
================  =============================  ================  ==============

The loss is computed in float32 at least (`sweeper.optim.make_loss`). So are, with ``bfloat16`` on a
CPU, convolutions whose kernel or stride is larger than their image (:func:`widen_convolutions`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sweeper.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """``dtype`` of parameters and images; ``autocast`` of the forward pass, None for none."""

    name: str
    device_type: str
    dtype: torch.dtype
    autocast: torch.dtype | None

    @property
    def of_products(self) -> torch.dtype:
        """The dtype in which matrix products read their factors."""
        return self.autocast or self.dtype

    def forward(self) -> AbstractContextManager[object]:
        """The context of a forward pass.

        Autocast's cache of cast weights is off: it only pays for weights used twice in a forward
        pass, and it would keep tensors of one CUDA graph capture alive beyond it.
        """
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast, cache_enabled=False)

    def scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaling for float16, whose gradients would otherwise vanish; None elsewhere."""
        if self.autocast is not torch.float16:
            return None
        return torch.amp.GradScaler(self.device_type)


def precision_of(train: TrainConfig, device: torch.device) -> Precision:
    """The precision that ``train`` means on ``device``."""
    name = train.precision
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return Precision(
        name=name,
        device_type=device.type,
        dtype=torch.float64 if name == "float64" else torch.float32,
        autocast={"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name),
    )


def widen_convolutions(model: nn.Module, precision: Precision) -> None:
    """Let some convolutions of ``model`` run in float32 where bfloat16 goes wrong, on a CPU.

    With a kernel or a stride larger than the image, oneDNN (torch 2.15) does not always write the
    gradient of that part of a kernel which meets padding only: it is what the memory held, infinite
    at times, and never twice the same.
    """
    if precision.device_type != "cpu" or precision.autocast is not torch.bfloat16:
        return
    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and _is_torchs(layer):
            forward = partial(_convolved, layer, layer.forward)
            layer.forward = forward  # type: ignore[method-assign]  # of this layer alone


def _is_torchs(layer: nn.Module) -> bool:
    """Whether what it does is torch's own: a subclass may take other arguments."""
    return type(layer).forward in {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


def _convolved(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    forward: Callable[[Tensor], Tensor],
    input: Tensor,  # noqa: A002 - the name that torch's own has
) -> Tensor:
    reaches = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sides = input.shape[-len(reaches) :]
    if all(max(step) <= side for *step, side in zip(reaches, layer.stride, sides, strict=True)):
        return forward(input)
    with torch.autocast("cpu", enabled=False):
        return forward(input.float())

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

The loss is computed in float32 at least (`sweeper.optim.make_loss`).
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

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

"""Statistics of every layer's weights and gradients, once an epoch (``train.layer_statistics``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def layer_statistics(model: nn.Module) -> dict[str, float]:
    """Mean and standard deviation of each weight matrix or kernel, and of its last gradient.

    Keys are ``layers.<parameter>_mean``, ``_std``, ``_grad_mean``, ``_grad_std`` and
    ``_grad_norm``, with the parameter's dotted name, as in ``layers.blocks.0.linear.weight_std``.
    Biases and the scales of normalization are left out. The gradient is that of the epoch's last
    step, after clipping. All values are read from the device at once.
    """
    names: list[str] = []
    values: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std, mean = torch.std_mean(parameter, correction=0)
        names += [f"layers.{name}_mean", f"layers.{name}_std"]
        values += [mean, std]
        if parameter.grad is None:
            continue
        std, mean = torch.std_mean(parameter.grad, correction=0)
        names += [f"layers.{name}_grad_{what}" for what in ("mean", "std", "norm")]
        values += [mean, std, torch.linalg.vector_norm(parameter.grad)]
    if not values:
        return {}
    return dict(zip(names, torch.stack(values).tolist(), strict=True))

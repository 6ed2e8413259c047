"""Everything that changes while a model trains, as plain tensors on the CPU, and back.

Two readers: a checkpoint, and the warm-up of a CUDA graph, whose steps must leave no trace.
Only tensors, numbers, strings, lists and dicts occur, so ``torch.load(weights_only=True)`` reads
it. Gradients and generators are not part of it: a step begins without gradients, and every epoch
seeds its own random numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CPU = torch.device("cpu")


def model_state(model: nn.Module, device: torch.device = _CPU) -> dict[str, Tensor]:
    """Parameters and buffers of ``model``, running statistics included, copied to ``device``."""
    return {name: _copied(value, device) for name, value in model.state_dict().items()}


def optimizer_state(
    optimizer: torch.optim.Optimizer, device: torch.device = _CPU
) -> dict[int, dict[str, Any]]:
    """The state of every parameter by its position, copied to ``device``; no hyper-parameters."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        position: {
            name: _copied(value, device) if isinstance(value, Tensor) else value
            for name, value in of_parameter.items()
        }
        for position, of_parameter in state.items()
    }


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    """Put ``saved`` back, in place, as a CUDA graph needs it and a fused optimizer lays it out.

    State that ``saved`` lacks becomes zero: all optimizers here begin with zeros, and SGD's first
    momentum is the gradient, which a buffer of zeros makes as well.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for position, parameter in enumerate(parameters):
        before = saved.get(position, {})
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                if name in before:
                    value.copy_(before[name])
                else:
                    value.zero_()


def _copied(value: Tensor, device: torch.device) -> Tensor:
    return value.detach().to(device, copy=True)

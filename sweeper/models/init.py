"""Weight initialisation (report R0 compares seven)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from sweeper.config.model import Init
from sweeper.errors import UsageError


def _kaiming_uniform(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, nonlinearity="relu")


def _kaiming_normal(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


def _trunc_normal(weight: Tensor) -> Tensor:
    return nn.init.trunc_normal_(weight, std=0.02)


def _sparse(weight: Tensor) -> Tensor:
    """A tenth of each input's weights zero, the others from N(0, 0.01²), as torch's default."""
    nn.init.sparse_(weight.flatten(1), sparsity=0.1, std=0.01)
    return weight


INITS: Final[Mapping[Init, Callable[[Tensor], Tensor]]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": _kaiming_uniform,
    "kaiming_normal": _kaiming_normal,
    "trunc_normal": _trunc_normal,
    "orthogonal": nn.init.orthogonal_,
    "sparse": _sparse,
}


def initialise(model: nn.Module, init: Init) -> None:
    """Draw the weights of every linear and convolutional layer anew and set their biases to zero.

    ``default`` leaves the model as it is, and so does a model on the meta device, which has no
    numbers. Norms, class tokens and position encodings are left alone.

    Raises UsageError for a layer that computes its weight from others at every pass, as weight and
    spectral normalization do: what is drawn would have no effect.
    """
    if init == "default":
        return
    draw = INITS[init]
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        if "weight" not in layer._parameters and "weight" not in layer._buffers:
            raise UsageError(
                f"model.init must be default where weights are computed from others at every pass, "
                f"as those of layer {name!r} are, but got init={init}; draw them where the "
                "model is made"
            )
        if layer.weight.is_meta:
            continue
        with torch.no_grad():
            draw(layer.weight)
            if layer.bias is not None:
                layer.bias.zero_()

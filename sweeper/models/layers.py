"""Layers that several families share: activations, norms, patch embedding, two-layer MLP.

Shapes: B batch, C width (of an image: channels), H and W height and width of the image, N patches,
p side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

from torch import Tensor, nn

from sweeper.config.model import Activation

ACTIVATIONS: Final[Mapping[Activation, Callable[[], nn.Module]]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
}


class PatchEmbedding(nn.Module):
    """Cut the image into patches, in rows, and map each linearly: x_BCHW -> x_BNC.

    The same numbers as a convolution of kernel and stride ``patch``, whose weight is
    ``projection.weight`` seen as [C, channels, p, p]; a matrix product also runs well under vmap.
    """

    def __init__(self, channels: int, patch: int, embed_dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Linear(channels * patch * patch, embed_dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        p = self.patch
        x = x_BCHW.reshape(batch, channels, height // p, p, width // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5)
        x_BNP = x.reshape(batch, (height // p) * (width // p), channels * p * p)
        x_BNC: Tensor = self.projection(x_BNP)
        return x_BNC


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of each of C features over images and patches: x_BNC -> x_BNC."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        return super().forward(x_BNC.flatten(0, 1)).reshape(x_BNC.shape)


def token_norm(name: Literal["none", "batch", "layer"], embed_dim: int) -> nn.Module:
    """The normalisation ``name`` of tokens x_BNC."""
    if name == "none":
        return nn.Identity()
    return TokenBatchNorm(embed_dim) if name == "batch" else nn.LayerNorm(embed_dim)


class TwoLayerMlp(nn.Module):
    """Linear, activation, dropout, linear, over the last dimension, which keeps its width.

    ``dropout_at``: after ``both`` linear layers, or between them only (``hidden``).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation,
        dropout: float,
        dropout_at: Literal["both", "hidden"] = "both",
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.up_dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width)
        self.down_dropout = nn.Dropout(dropout) if dropout_at == "both" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up_dropout(self.activation(self.up(x)))
        y: Tensor = self.down_dropout(self.down(hidden))
        return y

"""Vision transformer of report R1c.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv:2010.11929; the fixed
position encoding is that of Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762.

Shapes: B batch, C embedding width, N patches, T = N + 1 tokens (the class token is the first),
E heads, D = C / E width of a head, H and W of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper.config.data import DataShape
from sweeper.config.model import Vit as VitConfig
from sweeper.config.model import hidden_width
from sweeper.models.layers import PatchEmbedding, TwoLayerMlp


def sinusoidal_encoding(length: int, width: int) -> Tensor:
    """Fixed position encoding [length, width]: sines in even columns, cosines in odd ones.

    Columns 2i and 2i + 1 turn with the frequency ``10000^(-2i / width)`` a position (R1c draws
    100 x 16 and 1000 x 160).
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = position * frequency
    encoding = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]
    return encoding.to(torch.get_default_dtype())


class Attention(nn.Module):
    """Multi-head self-attention with output projection: x_BTC -> x_BTC."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        qkv_BT3ED = self.qkv(x_BTC).reshape(*x_BTC.shape[:2], 3, self.heads, -1)
        q_BETD, k_BETD, v_BETD = qkv_BT3ED.permute(2, 0, 3, 1, 4).unbind(0)
        y_BETD = functional.scaled_dot_product_attention(q_BETD, k_BETD, v_BETD)
        y_BTC: Tensor = self.dropout(self.projection(y_BETD.transpose(1, 2).flatten(2)))
        return y_BTC


class VitBlock(nn.Module):
    """Pre-norm: attention, then MLP, each added to its input."""

    def __init__(self, config: VitConfig, patches: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, config.heads, config.dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = TwoLayerMlp(
            width,
            hidden_width(config.hidden, embed_dim=width, patches=patches),
            activation=config.activation,
            dropout=config.dropout,
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC))
        y_BTC: Tensor = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return y_BTC


class Vit(nn.Module):
    """Patches, class token, positions, blocks, norm, class token to linear: x_BCHW -> logits."""

    position: Tensor | None

    def __init__(self, config: VitConfig, shape: DataShape) -> None:
        super().__init__()
        width = config.embed_dim
        patches = (shape.height // config.patch) * (shape.width // config.patch)
        self.stem = PatchEmbedding(shape.channels, config.patch, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        if config.position == "learned":
            self.position = nn.Parameter(torch.randn(patches + 1, width) * 0.02)
        else:
            fixed = config.position == "sinusoidal"
            encoding = sinusoidal_encoding(patches + 1, width) if fixed else None
            self.register_buffer("position", encoding, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*(VitBlock(config, patches) for _ in range(config.blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BNC = self.stem(x_BCHW)
        class_token_B1C = self.class_token.expand(len(x_BNC), -1, -1)
        x_BTC = torch.cat((class_token_B1C, x_BNC), dim=1)
        if self.position is not None:
            x_BTC = x_BTC + self.position
        x_BTC = self.blocks(self.dropout(x_BTC))
        logits: Tensor = self.head(self.norm(x_BTC)[:, 0])
        return logits

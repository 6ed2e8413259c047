"""MLP-Mixer with the variants of reports R0, R2, R3 and R4.4.

Source: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", 2021, arXiv:2105.01601.
With the defaults of the configuration it has, for a 32x32 colour image and ten classes,
``3Cp² + C + blocks·[(32/p)²·(C+1) + 8C² + 19C/2] + 2C + 10C + 10`` parameters (R4.4).

Shapes: B batch, C embedding width, N patches, p side of a patch, H and W of the image; of a hidden
layer H units.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from sweeper.config.data import DataShape
from sweeper.config.model import Mixer as MixerConfig
from sweeper.config.model import hidden_width
from sweeper.models.layers import PatchEmbedding, TwoLayerMlp, token_norm

_BY_IMAGE_ON: Final = "cuda"
"""A CPU turns the features round in no time, and with 16 patches is 6 % slower without."""


class TokenMlp(TwoLayerMlp):
    """The MLP across patches, the same for every feature of every image: x_BNC -> x_BNC.

    As one product for all images the features are rows, [B·C, N], which takes turning everything
    round before and after: on a GPU a quarter of a step with patches of 4. By a product of its own
    for ``each_image``, weight @ x_NC, nothing is turned; but then the gradient of a weight comes as
    one an image, which is for few patches only. What is dropped must not depend on the way: where
    something is, it is rows.
    """

    def __init__(self, patches: int, hidden: int, *, features: int, **options: Any) -> None:
        super().__init__(patches, hidden, **options)
        self.each_image = patches <= features and not options["dropout"]

    def forward(self, x_BNC: Tensor) -> Tensor:
        if self.each_image and x_BNC.device.type == _BY_IMAGE_ON:
            return self.by_image(x_BNC)
        return super().forward(x_BNC.transpose(1, 2).contiguous()).transpose(1, 2)

    def by_image(self, x_BNC: Tensor) -> Tensor:
        """The same numbers, by a product of its own for each image."""
        hidden_BHC = self.activation(_across(self.up, x_BNC))
        return _across(self.down, hidden_BHC)


def _across(layer: nn.Linear, x_BNC: Tensor) -> Tensor:
    """``layer`` across patches: x_BNC -> [B, out, C]."""
    weight, kind = layer.weight, x_BNC.device.type
    if torch.is_autocast_enabled(kind):  # which would cast a copy for every image
        weight = weight.to(torch.get_autocast_dtype(kind))
    y = torch.bmm(weight.expand(len(x_BNC), -1, -1), x_BNC)
    return y + layer.bias[:, None].to(y.dtype)


def by_rows(model: nn.Module) -> nn.Module:
    """``model``, whose patches are mixed as rows from now on: under vmap weights would be copied
    for every image, and what may be dropped has to be asked for."""
    for layer in model.modules():
        if isinstance(layer, TokenMlp):
            layer.each_image = False
    return model


class MixerBlock(nn.Module):
    """Norm, MLP across patches, then norm, MLP across features; each with a residual, or none.

    ``token_mlp.up.weight`` [hidden, N] holds one picture of the image's patches a row: what R4.6
    draws of the first block.
    """

    def __init__(self, config: MixerConfig, patches: int) -> None:
        super().__init__()
        width = config.embed_dim

        def units(hidden: int | str) -> int:
            return hidden_width(hidden, embed_dim=width, patches=patches)

        options: dict[str, Any] = {
            "activation": config.activation,
            "dropout": config.dropout,
            "dropout_at": config.dropout_at,
        }
        self.skip = config.skip
        self.token_norm = token_norm(config.norm, width)
        self.token_mlp = TokenMlp(patches, units(config.token_hidden), features=width, **options)
        self.channel_norm = token_norm(config.norm, width)
        self.channel_mlp = TwoLayerMlp(width, units(config.channel_hidden), **options)

    def forward(self, x_BNC: Tensor) -> Tensor:
        y_BNC: Tensor = self.token_mlp(self.token_norm(x_BNC))
        x_BNC = x_BNC + y_BNC if self.skip else y_BNC
        y_BNC = self.channel_mlp(self.channel_norm(x_BNC))
        return x_BNC + y_BNC if self.skip else y_BNC


class Mixer(nn.Module):
    """Patches, blocks, norm, mean over patches, linear: x_BCHW -> logits [B, classes]."""

    def __init__(self, config: MixerConfig, shape: DataShape) -> None:
        super().__init__()
        patches = (shape.height // config.patch) * (shape.width // config.patch)
        self.stem = PatchEmbedding(shape.channels, config.patch, config.embed_dim)
        self.stem_norm = token_norm(config.stem_norm, config.embed_dim)
        self.blocks = nn.Sequential(*(MixerBlock(config, patches) for _ in range(config.blocks)))
        self.norm = token_norm(config.final_norm, config.embed_dim)
        self.head = nn.Linear(config.embed_dim, shape.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BNC = self.stem_norm(self.stem(x_BCHW))
        x_BNC = self.norm(self.blocks(x_BNC))
        logits: Tensor = self.head(x_BNC.mean(dim=1))
        return logits

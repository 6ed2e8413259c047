"""Multi-layer perceptron (reports R1a and R4.2).

Shapes: B batch, C channels, H and W height and width of the image.
"""

from __future__ import annotations

from torch import Tensor, nn

from sweeper.config.data import DataShape
from sweeper.config.model import Mlp as MlpConfig
from sweeper.models.layers import ACTIVATIONS


class Mlp(nn.Module):
    """Flatten, ``layers`` times (linear, norm, activation, dropout), linear: x_BCHW -> logits."""

    def __init__(self, config: MlpConfig, shape: DataShape) -> None:
        super().__init__()
        features = shape.channels * shape.height * shape.width
        layers: list[nn.Module] = []
        for _ in range(config.layers):
            layers.append(nn.Linear(features, config.width))
            if config.norm == "batch":
                layers.append(nn.BatchNorm1d(config.width))
            elif config.norm == "layer":
                layers.append(nn.LayerNorm(config.width))
            layers.append(ACTIVATIONS[config.activation]())
            layers.append(nn.Dropout(config.dropout))
            features = config.width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(features, shape.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x_BCHW.flatten(1)))
        return logits

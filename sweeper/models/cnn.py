"""Convolutional network of report R1b: conv, ReLU, max-pool three times, then two linear layers.

For a 32x32 colour image and ten classes the defaults have 1,190,000 weights, biases not counted.

Shapes: B batch, C channels, H and W height and width of the image.
"""

from __future__ import annotations

from torch import Tensor, nn

from sweeper.config.data import DataShape
from sweeper.config.model import Cnn as CnnConfig
from sweeper.models.layers import ACTIVATIONS


class Cnn(nn.Module):
    """Convolutions that keep the size, each pooled by two, and two linear layers.

    x_BCHW -> logits [B, classes]. ``ceil_mode`` rounds the size up in the last pooling.
    """

    def __init__(self, config: CnnConfig, shape: DataShape) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels, height, width = shape.channels, shape.height, shape.width
        for index, stage_channels in enumerate(config.channels):
            ceil_mode = config.ceil_mode and index == len(config.channels) - 1
            stages.append(_stage(config, channels, stage_channels, ceil_mode=ceil_mode))
            round_up = int(ceil_mode)
            height, width = (height + round_up) // 2, (width + round_up) // 2
            channels = stage_channels
        self.stages = nn.Sequential(*stages)
        self.hidden = nn.Linear(channels * height * width, config.hidden)
        self.activation = ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden, shape.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stages(x_BCHW)
        x_BF = self.dropout(self.activation(self.hidden(x_BCHW.flatten(1))))
        logits: Tensor = self.head(x_BF)
        return logits


def _stage(config: CnnConfig, channels: int, out: int, *, ceil_mode: bool) -> nn.Sequential:
    """Convolution, batch normalisation if asked for, activation, max-pooling by two."""
    stage = nn.Sequential()
    stage.append(nn.Conv2d(channels, out, config.kernel, padding=config.kernel // 2))
    if config.batch_norm:
        stage.append(nn.BatchNorm2d(out))
    stage.append(ACTIVATIONS[config.activation]())
    stage.append(nn.MaxPool2d(2, ceil_mode=ceil_mode))
    return stage

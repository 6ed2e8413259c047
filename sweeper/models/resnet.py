"""ResNet-18 (reports R4.3 and R4.5): torchvision's, with a stem for small images.

Source: He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385; its
section 4.2 replaces the stem for CIFAR-10 by a 3x3 convolution without max-pooling.
"""

from __future__ import annotations

from torch import nn

from sweeper.config.data import DataShape
from sweeper.config.model import Resnet18 as Resnet18Config


def resnet18(config: Resnet18Config, shape: DataShape) -> nn.Module:
    """ResNet-18 with random weights: x_BCHW -> logits [B, classes].

    ``conv1.weight`` [64, channels, 3, 3] holds the kernels that R4.5 draws (7x7 with the
    ``imagenet`` stem).
    """
    from torchvision.models import resnet18 as build  # a second to import: not for other models

    model: nn.Module = build(weights=None, num_classes=shape.classes)
    if config.stem == "cifar":
        model.conv1 = _stem(shape.channels, kernel=3, stride=1)
        model.maxpool = nn.Identity()
    elif shape.channels != 3:
        model.conv1 = _stem(shape.channels, kernel=7, stride=2)
    return model


def _stem(channels: int, *, kernel: int, stride: int) -> nn.Conv2d:
    """The first convolution, initialised as torchvision initialises all of them."""
    stem = nn.Conv2d(channels, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem

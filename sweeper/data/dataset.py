"""A data set as one trial uses it: three parts, how they are standardized, what they are.

Shapes: ``N`` images, ``C`` channels, ``H`` height, ``W`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sweeper.config.data import DataShape
from sweeper.data.augment import Augment
from sweeper.data.standardize import Standardize


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Images and labels of the training, validation or test part, on one device.

    ``images`` is uint8 ``[N, C, H, W]`` (float32 for circles) and is only ever read: it may be
    mapped from a file that other workers share. ``labels`` is int64 ``[N]``. ``standardized``
    gives the whole part standardized, float32, mapped likewise; None where nothing is shared.
    """

    images: Tensor
    labels: Tensor
    standardized: Callable[[], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Self:
        """The part on ``device``; what is shared stays where it is, in the CPU's memory."""
        return type(self)(
            images=self.images.to(device),
            labels=self.labels.to(device),
            standardized=self.standardized if torch.device(device).type == "cpu" else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A data set as one trial uses it.

    ``digest`` is a hash of the images and labels of all three parts: equal digests mean equal
    data, on any machine and however it is stored. ``source`` says where it was read from.
    """

    name: str
    source: str
    shape: DataShape
    classes: tuple[str, ...]
    train: Part
    val: Part
    test: Part
    standardize: Standardize
    augment: Augment
    digest: str

    def describe(self) -> dict[str, object]:
        """What the tracker records of a data set: names, digest, shape and counts, no tensors."""
        return {
            "name": self.name,
            "source": self.source,
            "digest": self.digest,
            "shape": list(self.shape[:3]),
            "classes": list(self.classes),
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
        }

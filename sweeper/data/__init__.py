"""Data sets as tensors on the training device: sources, splits, standardisation, augmentation.

Shapes: ``N`` images, ``C`` channels, ``H`` height, ``W`` width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from sweeper.config.data import DataConfig, DataShape, cropped
from sweeper.data.augment import Augment
from sweeper.data.cifar import cifar10
from sweeper.data.folder import image_folder
from sweeper.data.generated import circles, digits
from sweeper.data.idx import idx
from sweeper.data.raw import RawData, RawPart
from sweeper.data.split import Index, hold_out, limited
from sweeper.data.standardize import Standardize
from sweeper.data.transforms import centre_crop
from sweeper.errors import UsageError

__all__ = ["DATASETS", "Augment", "Dataset", "Part", "RawData", "Standardize", "load"]

DATASETS: Final[dict[str, Callable[[Any, Path], RawData]]] = {
    "digits": digits,
    "circles": circles,
    "mnist": idx,
    "fashion_mnist": idx,
    "kmnist": idx,
    "cifar10": cifar10,
    "image_folder": image_folder,
}
"""Where each data set comes from: a function of its own section and the data folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Images and labels of the training, validation or test part, on one device.

    ``images`` is uint8 ``[N, C, H, W]`` (float32 for circles) and is only ever read: it may be
    mapped from a file that other workers share. ``labels`` is int64 ``[N]``.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(images=self.images.to(device), labels=self.labels.to(device))


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


def load(config: DataConfig, *, folder: Path, device: torch.device) -> Dataset:
    """The data set of a ``data`` section, split, on ``device``, ready to train on.

    ``folder`` is the root of all data sets (torchvision's layout). A limit is applied first, then
    validation images are held out of what is left of the training images; statistics come from
    the remaining training part. Both draws are stratified. The test part is the source's own and
    is the same under every ``split_seed``. Where an augmentation crops to another size, validation
    and test images are cut to it about their centre, and statistics come from images so cut.

    Raises DataNotFoundError where files are missing or damaged, and UsageError where the section
    asks for what the data cannot give.
    """
    raw = DATASETS[config.name](config, folder)
    shape = _shape(raw, config)
    size = (shape.height, shape.width)
    kept = limited(raw.train.labels, config.limit)
    labels = raw.train.labels if kept is None else raw.train.labels[kept]
    train_index, val_index = hold_out(
        labels, config.validation, classes=raw.classes, seed=config.split_seed
    )
    if kept is not None:
        train_index, val_index = kept[train_index], kept[val_index]
    parts = [
        _part(raw.train, train_index),
        _part(raw.train, val_index, size),
        _part(raw.test, limited(raw.test.labels, config.limit), size),
    ]
    digest = _digest(parts)
    train, val, test = (part.to(device) for part in parts)
    return Dataset(
        name=config.name,
        source=raw.source,
        shape=shape,
        classes=raw.classes,
        train=train,
        val=val,
        test=test,
        standardize=Standardize.fit(centre_crop(train.images, size), config.standardize),
        augment=Augment(config.augment),
        digest=digest,
    )


def _shape(raw: RawData, config: DataConfig) -> DataShape:
    """What the model sees of these images. Raises UsageError for a crop that is too large."""
    channels, height, width = raw.train.images.shape[1:]
    try:
        return cropped(DataShape(channels, height, width, len(raw.classes)), config.augment)
    except ValueError as error:
        raise UsageError(f"data.augment: {error}") from error


def _part(raw: RawPart, index: Index | None, size: tuple[int, int] | None = None) -> Part:
    """The chosen images, copied, or all of them as they are; cut to ``size`` about their centre."""
    images = raw.images if index is None else raw.images[index]
    labels = raw.labels if index is None else raw.labels[index]
    images_NCHW = torch.from_numpy(images)
    if size is not None and size != images_NCHW.shape[-2:]:
        images_NCHW = centre_crop(images_NCHW, size).contiguous()
    return Part(images=images_NCHW, labels=torch.from_numpy(labels))


def _digest(parts: list[Part]) -> str:
    """16 hexadecimal digits; SHA-256 reads about 2 GB/s."""
    digest = hashlib.sha256()
    for part in parts:
        for tensor in (part.images, part.labels):
            array = tensor.numpy()
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]

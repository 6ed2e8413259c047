"""Data sets as tensors on the training device: sources, splits, standardisation, augmentation.

Shapes: ``N`` images, ``C`` channels, ``H`` height, ``W`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from sweeper.config.data import DataConfig
from sweeper.data.augment import Augment
from sweeper.data.cifar import cifar10, cifar10_origin
from sweeper.data.dataset import Dataset, Part
from sweeper.data.drawn import drawn
from sweeper.data.folder import folder_origin, image_folder
from sweeper.data.generated import circles, digits
from sweeper.data.idx import idx, idx_origin
from sweeper.data.prepared import shared_parts, shared_standardization
from sweeper.data.raw import Origin, RawData
from sweeper.data.shared import SharedFolder
from sweeper.data.standardize import Standardize
from sweeper.data.transforms import centre_crop
from sweeper.settings import prepared_folder

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

ORIGINS: Final[dict[str, Callable[[Any, Path], Origin]]] = {
    "mnist": idx_origin,
    "fashion_mnist": idx_origin,
    "kmnist": idx_origin,
    "cifar10": cifar10_origin,
    "image_folder": folder_origin,
}
"""The files of a data set that is read from files, and so worth sharing."""


def load(config: DataConfig, *, folder: Path, device: torch.device) -> Dataset:
    """The data set of a ``data`` section, split, on ``device``, ready to train on.

    ``folder`` is the root of all data sets (torchvision's layout). A limit is applied first, then
    validation images are held out of what is left of the training images; statistics come from
    the remaining training part. Both draws are stratified. The test part is the source's own and
    is the same under every ``split_seed``. Where an augmentation crops to another size, validation
    and test images are cut to it about their centre, and statistics come from images so cut.

    What was read from files is kept under ``folder`` and mapped: every process of a machine has
    the same pages (`sweeper.data.shared`). On a CPU these are the tensors of the result.

    Raises DataNotFoundError where files are missing or damaged, and UsageError where the section
    asks for what the data cannot give.
    """
    standardize = None
    if find := ORIGINS.get(config.name):
        shared = SharedFolder(folder=prepared_folder(folder), name=config.name)
        made = shared_parts(config, find(config, folder), shared)
        if device.type == "cpu":
            standardize, made = shared_standardization(config, shared, made)
    else:
        made = drawn(config, DATASETS[config.name](config, folder))
    train, val, test = (part.to(device) for part in made.parts.values())
    if standardize is None:
        size = (made.shape.height, made.shape.width)
        standardize = Standardize.fit(centre_crop(train.images, size), config.standardize)
    return Dataset(
        name=config.name,
        source=made.source,
        shape=made.shape,
        classes=made.classes,
        train=train,
        val=val,
        test=test,
        standardize=standardize,
        augment=Augment(config.augment),
        digest=made.digest,
    )

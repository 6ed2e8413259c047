"""The three parts that a ``data`` section draws from a source, on the CPU.

Shapes: ``N`` images, ``C`` channels, ``H`` height, ``W`` width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from sweeper.config.data import Crop, DataConfig, DataShape, cropped
from sweeper.data.dataset import Part
from sweeper.data.raw import RawData, RawPart
from sweeper.data.shared import Content
from sweeper.data.split import Index, hold_out, limited
from sweeper.data.transforms import centre_crop
from sweeper.errors import UsageError

PARTS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Parts that are not standardized. ``digest``, ``source`` and ``shape`` as `Dataset` has them.

    ``parts`` has one for each of :data:`PARTS`, in that order. ``new``: drawn by this process just
    now, and not found as another one has drawn them.
    """

    source: str
    shape: DataShape
    classes: tuple[str, ...]
    digest: str
    parts: dict[str, Part]
    new: bool = True

    def content(self) -> Content:
        """What :meth:`of` takes."""
        tensors = {}
        for name, part in self.parts.items():
            tensors[f"{name}.images"], tensors[f"{name}.labels"] = part.images, part.labels
        facts = {"source": self.source, "classes": self.classes, "digest": self.digest}
        return Content(tensors=tensors, facts={**facts, "shape": tuple(self.shape)})

    @classmethod
    def of(cls, content: Content) -> Self:
        tensors, facts = content.tensors, content.facts
        return cls(
            source=facts["source"],
            shape=DataShape(*facts["shape"]),
            classes=facts["classes"],
            digest=facts["digest"],
            parts={
                name: Part(images=tensors[f"{name}.images"], labels=tensors[f"{name}.labels"])
                for name in PARTS
            },
            new=content.new,
        )


def drawn_by(config: DataConfig) -> dict[str, Any]:
    """All of a section that :func:`drawn` depends on, as JSON has it."""
    crops = [step.size for step in config.augment if isinstance(step, Crop) and step.size]
    return {**config.model_dump(mode="json", exclude={"augment", "standardize"}), "crops": crops}


def drawn(config: DataConfig, raw: RawData) -> Drawn:
    """The parts of ``config``, copied from ``raw``; see :func:`sweeper.data.load`.

    Raises UsageError where the section asks for what the data cannot give.
    """
    shape = _shape(raw, config)
    size = (shape.height, shape.width)
    kept = limited(raw.train.labels, config.limit)
    labels = raw.train.labels if kept is None else raw.train.labels[kept]
    train, val = hold_out(labels, config.validation, classes=raw.classes, seed=config.split_seed)
    if kept is not None:
        train, val = kept[train], kept[val]
    parts = {
        "train": _part(raw.train, train),
        "val": _part(raw.train, val, size),
        "test": _part(raw.test, limited(raw.test.labels, config.limit), size),
    }
    return Drawn(
        source=raw.source,
        shape=shape,
        classes=raw.classes,
        digest=_digest(parts.values()),
        parts=parts,
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


def _digest(parts: Iterable[Part]) -> str:
    """16 hexadecimal digits; SHA-256 reads about 2 GB/s."""
    digest = hashlib.sha256()
    for part in parts:
        for tensor in (part.images, part.labels):
            array = tensor.numpy()
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]

"""Small images in the formats of real data sets."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def learnable_images(
    count: int, shape: tuple[int, ...], classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[count, *shape]`` and labels in turn: a picture for each class, under noise.

    A model that learns at all tells them apart, and no two images are equal.
    """
    patterns = np.random.default_rng(0).integers(0, 256, (classes, *shape))
    labels = np.arange(count) % classes
    noise = np.random.default_rng(seed + 1).normal(0, 60, (count, *shape))
    return (patterns[labels] + noise).clip(0, 255).astype(np.uint8), labels


def write_idx(path: Path, array: np.ndarray, *, packed: bool = False) -> None:
    """``array`` (uint8) as an IDX file, with ``.gz`` where it is to be packed."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, mtime=0))
    else:
        path.write_bytes(content)


def write_idx_family(raw: Path, *, train: int, test: int, packed: bool = False) -> None:
    """The four files of an MNIST-like data set, in a folder that is not there yet."""
    raw.mkdir(parents=True)
    for prefix, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = learnable_images(count, (28, 28), 10, seed)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images, packed=packed)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels, packed=packed)

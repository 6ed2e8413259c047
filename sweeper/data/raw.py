"""What a source of images hands over, before anything is held out, limited or moved.

Shapes: ``N`` images, ``C`` channels, ``H`` height, ``W`` width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[Any]
"""uint8 ``[N, C, H, W]``; float32 for points in the plane."""

Labels = NDArray[np.int64]
"""``[N]``, from 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RawPart:
    """All training or all test images of a source. ``images`` may be mapped from a file."""

    images: Images
    labels: Labels


@dataclass(frozen=True, kw_only=True, eq=False)
class RawData:
    """A whole data set as its source has it. ``source``: where it was read from, for people."""

    train: RawPart
    test: RawPart
    classes: tuple[str, ...]
    source: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """Files that were found: ``digest`` tells them from any others, ``read`` reads them.

    A file that was changed has another digest, so what was made of it is never taken for new.
    """

    digest: str
    read: Callable[[], RawData]


def digest_of(files: Iterable[Path]) -> str:
    """What tells these files from any others, and from themselves once they have been changed.

    A hash of their paths, sizes and the times when they were last written and replaced; of one
    that is not there, that it is not.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
            told = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        except OSError:
            told = "missing"
        digest.update(os.fsencode(f"{file}\0{told}\0"))
    return digest.hexdigest()[:16]

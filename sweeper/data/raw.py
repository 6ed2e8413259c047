"""What a source of images hands over, before anything is held out, limited or moved.

Shapes: ``N`` images, ``C`` channels, ``H`` height, ``W`` width.
"""

from __future__ import annotations

from dataclasses import dataclass
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

"""Data sets that need no download: scikit-learn's digits, and circles in the plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sweeper.config.data import Circles, Digits
from sweeper.data.raw import Images, Labels, RawData, RawPart
from sweeper.data.split import stratified

_TEST_SHARE = 0.2


def digits(config: Digits, folder: Path) -> RawData:
    """scikit-learn's 1,797 digits: uint8 ``[N, 1, 8, 8]``, the values 0 to 16 spread to 0 to 255.

    scikit-learn has no test part of its own: a stratified fifth, always the same, is taken.
    """
    from sklearn.datasets import load_digits  # loads scipy and more; only where it is used

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return _with_test_part(
        images,
        bunch.target.astype(np.int64),
        seed=0,
        classes=tuple(str(name) for name in bunch.target_names),
        source="sklearn.datasets.load_digits",
    )


def circles(config: Circles, folder: Path) -> RawData:
    """Two concentric circles (report R1a): float32 ``[N, 1, 1, 2]``, x and y as two pixels.

    A stratified fifth is the test part; ``data_seed`` draws the points and that fifth.
    """
    from sklearn.datasets import make_circles  # loads scipy and more; only where it is used

    points, labels = make_circles(
        config.samples, noise=config.noise, factor=config.factor, random_state=config.data_seed
    )
    return _with_test_part(
        points.astype(np.float32).reshape(-1, 1, 1, 2),
        labels.astype(np.int64),
        seed=config.data_seed,
        classes=("outer", "inner"),
        source="sklearn.datasets.make_circles",
    )


def _with_test_part(
    images: Images, labels: Labels, *, seed: int, classes: tuple[str, ...], source: str
) -> RawData:
    test, train = stratified(labels, round(_TEST_SHARE * len(labels)), seed=seed)
    return RawData(
        train=RawPart(images=images[train], labels=labels[train]),
        test=RawPart(images=images[test], labels=labels[test]),
        classes=classes,
        source=source,
    )

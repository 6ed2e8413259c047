"""Stratified draws: which images validate, which ones a limit keeps.

A draw depends on the labels, the count and the seed only. It is taken from the raw stream of a
bit generator, which numpy guarantees to stay the same from version to version, unlike the methods
of its ``Generator``: a study resumed after an upgrade validates on the same images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sweeper.config.data import held_out
from sweeper.data.raw import Labels
from sweeper.errors import UsageError

Index = NDArray[np.int64]


def stratified(labels: Labels, count: int, *, seed: int) -> tuple[Index, Index]:
    """``count`` of the ``[N]`` images, each class in proportion, and the remaining ones.

    Both are sorted. ``0 <= count <= N`` must hold. What the proportions leave over goes to the
    classes with the largest fractions (to the lower label among equals).
    """
    keys = np.random.PCG64(seed).random_raw(len(labels))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = np.zeros(len(labels), dtype=bool)
    for indices, quota in zip(members, _quotas([len(m) for m in members], count), strict=True):
        chosen[indices[np.argsort(keys[indices], kind="stable")[:quota]]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _quotas(sizes: Sequence[int], count: int) -> list[int]:
    """``count`` shared out in proportion to ``sizes`` (largest remainder)."""
    total = max(sum(sizes), 1)
    quotas = [size * count // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * count % total), i))
    for i in by_remainder[: count - sum(quotas)]:
        quotas[i] += 1
    return quotas


def limited(labels: Labels, limit: int | None) -> Index | None:
    """The indices that a limit keeps, or None where it keeps all.

    The draw does not depend on ``split_seed``: another split is one of the same images.
    """
    if limit is None or limit >= len(labels):
        return None
    return stratified(labels, limit, seed=0)[0]


def hold_out(
    labels: Labels, validation: int | float, *, classes: Sequence[str], seed: int
) -> tuple[Index, Index]:
    """The training and the validation indices among the images with these labels.

    Raises UsageError where more is held out than there is, or where a class is left without a
    training image.
    """
    available = len(labels)
    wanted = held_out(validation, available)
    if wanted >= available:
        raise UsageError(
            f"data.validation must be smaller than the number of training images, but "
            f"{validation} of {available} were asked for; lower it, or raise data.limit"
        )
    chosen, training = stratified(labels, wanted, seed=seed)
    counts = np.bincount(labels[training], minlength=len(classes))
    if not counts.all():
        missing = classes[int(np.argmin(counts))]
        raise UsageError(
            f"every class must keep at least one training image, but {wanted} of {available} "
            f"images were held out for validation and none of class {missing!r} is left; "
            f"lower data.validation, or raise data.limit"
        )
    return training, chosen

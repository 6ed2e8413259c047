"""Stratified draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.data.split import hold_out, limited, stratified
from sweeper.errors import UsageError

CLASSES = tuple("abcdefghij")


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**70),
)
def test_a_draw_is_a_stratified_partition(labels: np.ndarray, share: float, seed: int) -> None:
    count = round(share * len(labels))
    chosen, rest = stratified(labels, count, seed=seed)
    assert len(chosen) == count
    assert sorted([*chosen, *rest]) == list(range(len(labels)))
    assert (np.diff(chosen) > 0).all() and (np.diff(rest) > 0).all()
    for label in np.unique(labels):
        exact = count * (labels == label).mean()
        assert abs((labels[chosen] == label).sum() - exact) < 1


def test_the_draw_of_a_seed_never_changes() -> None:
    labels = np.arange(30) % 3
    assert stratified(labels, 6, seed=0)[0].tolist() == [1, 3, 11, 13, 20, 21]
    assert stratified(labels, 6, seed=1)[0].tolist() == [2, 9, 14, 16, 18, 28]


def test_a_share_and_a_number_hold_out_the_same() -> None:
    labels = np.arange(100) % 10
    by_share = hold_out(labels, 0.2, classes=CLASSES, seed=3)
    by_number = hold_out(labels, 20, classes=CLASSES, seed=3)
    for left, right in zip(by_share, by_number, strict=True):
        assert left.tolist() == right.tolist()
    assert np.bincount(labels[by_share[1]]).tolist() == [2] * 10


@pytest.mark.parametrize("validation", [100, 5000])
def test_holding_out_everything_is_refused(validation: int) -> None:
    with pytest.raises(UsageError, match=rf"data.validation must be smaller.*{validation} of 100"):
        hold_out(np.arange(100) % 10, validation, classes=CLASSES, seed=0)


def test_a_class_without_a_training_image_is_refused_by_name() -> None:
    labels = np.array([0] * 50 + [1])
    with pytest.raises(UsageError, match=r"none of class 'b' is left"):
        hold_out(labels, 49, classes=CLASSES[:2], seed=0)
    with pytest.raises(UsageError, match=r"none of class 'c' is left"):
        hold_out(labels, 1, classes=CLASSES[:3], seed=0)


def test_a_limit_above_what_there_is_keeps_all() -> None:
    labels = np.arange(40) % 4
    assert limited(labels, None) is None
    assert limited(labels, 40) is None
    kept = limited(labels, 12)
    assert kept is not None
    assert np.bincount(labels[kept]).tolist() == [3, 3, 3, 3]

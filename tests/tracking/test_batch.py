"""What is sent fits MLflow's limits, and nothing is lost by cutting it up."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sweeper.tracking.batch import (
    Batch,
    Point,
    batches,
    fitting_name,
    fitting_param,
    fitting_tag,
    halves,
)


def points(count: int) -> list[Point]:
    return [Point(name=f"m{i}", value=float(i), time_ms=i, step=i) for i in range(count)]


def texts(count: int, length: int = 5) -> dict[str, str]:
    return {f"k{i}": "v" * length for i in range(count)}


@given(st.integers(0, 2500), st.integers(0, 250), st.integers(0, 250), st.sampled_from([5, 3000]))
def test_batches_hold_everything_and_no_more_than_mlflow_takes(
    metrics: int, params: int, tags: int, length: int
) -> None:
    parts = list(batches(points(metrics), texts(params, length), texts(tags, length)))
    assert all(0 < len(part) <= 1000 for part in parts)
    assert all(len(part.params) <= 100 and len(part.tags) <= 100 for part in parts)
    assert [point for part in parts for point in part.metrics] == points(metrics)
    assert {k: v for part in parts for k, v in part.params.items()} == texts(params, length)
    assert {k: v for part in parts for k, v in part.tags.items()} == texts(tags, length)
    size = max(
        (sum(len(v) for v in [*p.params.values(), *p.tags.values()]) for p in parts), default=0
    )
    assert size < 1_000_000


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_halves_hold_everything_and_get_smaller(metrics: int, params: int, tags: int) -> None:
    whole = Batch(metrics=points(metrics), params=texts(params), tags=texts(tags))
    left, right = halves(whole)
    assert len(left) + len(right) == len(whole)
    assert left.metrics + right.metrics == whole.metrics
    assert left.params | right.params == whole.params
    assert left.tags | right.tags == whole.tags
    if len(whole) > 1:
        assert max(len(left), len(right)) < len(whole)


@settings(deadline=None)  # the first call loads MLflow
@given(st.text(min_size=1, max_size=400))
@example(".")
@example("..")
@example("../a")
@example("a//b/")
@example("/")
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    fitted = fitting_name(name)
    _validate_metric_name(fitted)
    _validate_param_name(fitted)
    assert len(fitted) <= 250


@pytest.mark.parametrize("name", ["optimizer.lr", "model.patch-size", "val/loss", "a b", "é:1"])
def test_a_good_name_stays(name: str) -> None:
    assert fitting_name(name) == name


def test_long_names_that_differ_at_the_end_stay_different() -> None:
    assert fitting_name("x" * 300 + "a") != fitting_name("x" * 300 + "b")


@pytest.mark.parametrize(("fit", "limit"), [(fitting_param, 6000), (fitting_tag, 8000)])
def test_a_long_value_says_that_it_was_cut(fit, limit: int) -> None:
    assert fit("x" * limit) == "x" * limit
    cut = fit("x" * (limit + 1))
    assert len(cut) == limit
    assert re.search(rf"x … \[cut: {limit + 1} characters\]$", cut)

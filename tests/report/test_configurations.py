"""Trials are put together by configuration, and compared by what differs."""

from __future__ import annotations

import math

import pytest
from report.conftest import made, row

from sweeper.report.collect import device_seconds, wall_seconds
from sweeper.report.configurations import Spread
from sweeper.report.leaderboard import described, leaderboard


def test_seeds_are_put_together_and_ranked_by_their_mean() -> None:
    data = made(
        row(0, params={"model.width": 8, "train.seed": 0}, accuracy=0.9),
        row(1, params={"model.width": 8, "train.seed": 1}, accuracy=0.5),
        row(2, params={"model.width": 16, "data.split_seed": 3}, accuracy=0.8),
        parameters={"model.width": [8, 16], "train.seed": [0, 1], "data.split_seed": [0, 3]},
    )
    assert data.factors == ("model.width",)
    assert [config.numbers for config in data.ranked] == [[2], [0, 1]]
    texts = [[cell.text for cell in line] for line in leaderboard(data).rows]
    assert [line[:3] for line in texts] == [
        ["1", "16", "0.8000"],
        ["2", "8", "0.7000 ± 0.2828"],
    ]
    assert [line[-1] for line in texts] == ["2", "0, 1"]


def test_less_is_better_where_the_objective_is_minimized() -> None:
    data = made(
        row(0, params={"model.width": 8}, accuracy=0.9),
        row(1, params={"model.width": 16}, accuracy=0.1),
        objective={"metric": "val_loss", "direction": "minimize"},
        parameters={"model.width": [8, 16]},
    )
    assert [config.numbers for config in data.ranked] == [[1], [0]]


def test_a_parameter_without_a_say_is_a_dash() -> None:
    data = made(
        row(0, params={"optimizer.name": "sgd"}, accuracy=0.9),
        row(1, params={"optimizer.name": "momentum", "optimizer.momentum": 0.5}, accuracy=0.8),
        optimizer={"name": "adam", "momentum": 0.9},
        parameters={
            "optimizer.name": ["sgd", "momentum"],
            "optimizer.momentum": {"values": [0.5], "when": {"optimizer.name": "momentum"}},
        },
    )
    assert [described(data, config) for config in data.ranked] == [
        "optimizer sgd, momentum –",
        "optimizer momentum, momentum 0.5",
    ]


def test_what_cannot_be_a_configuration_is_still_a_row() -> None:
    data = made(
        row(0, params={"model.width": "eight"}, state="failed", outcome="invalid"),
        row(1, params={}, state="waiting", outcome=None),
        parameters={"model.width": [8]},
    )
    assert [config.numbers for config in data.found] == [[0]]
    assert data.ranked == []


def test_a_spread_needs_two_values() -> None:
    assert Spread.of([]) is None
    assert Spread.of([float("nan"), None]) is None
    assert Spread.of([0.5]) == Spread(mean=0.5, deviation=None, count=1)
    two = Spread.of([1.0, 3.0])
    assert two is not None
    assert (two.mean, two.count) == (2.0, 2)
    assert two.deviation == pytest.approx(2**0.5)


@pytest.mark.parametrize("values", [(0.5, math.inf, 0.7), (math.inf, 0.5), (math.inf, math.inf)])
def test_a_mean_with_an_infinite_value_is_infinite(values: tuple[float, ...]) -> None:
    found = Spread.of(values)
    assert found == Spread(mean=math.inf, deviation=None, count=len(values))


def test_device_time_counts_trials_at_the_same_time_on_one_worker_once() -> None:
    cohort = row(1, started=row(0).started, ended=row(0).ended)
    lost = row(2, state="retried", outcome="lost")
    assert device_seconds((row(0), cohort)) == 60
    assert device_seconds((row(0), row(1, worker="other"), lost)) == 180
    assert device_seconds((row(0, started=None), row(1, seconds=None, ended=None))) == 60
    assert wall_seconds((row(0), row(4))) == 300
    assert wall_seconds(()) is None

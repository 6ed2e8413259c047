"""What a study would run, read off its spec."""

from __future__ import annotations

import pytest

from sweeper.study.parse import loads
from sweeper.study.plan import COUNTED, Plan, plan

HEAD = "name: s\ndata: {name: digits}\nmodel: {name: mixer}\n"


def planned(text: str) -> Plan:
    return plan(loads(HEAD + text))


def test_a_sampled_study_runs_its_budget() -> None:
    found = planned(
        """
search: {trials: 7}
parameters:
  optimizer.lr: {low: 1e-4, high: 0.1, log: true}
  model.blocks: {values: [1, 2], when: {model.skip: true}}
  model.skip: [true, false]
reference: {source: r, trials: [{}, {}]}
"""
    )
    assert (found.study, found.trials, found.reference_trials, found.points) == ("s", 7, 2, None)
    rate, blocks, skip = found.parameters
    assert (rate.path, rate.values, rate.low, rate.high, rate.log, rate.step, rate.count) == (
        "optimizer.lr",
        None,
        1e-4,
        0.1,
        True,
        None,
        None,
    )
    assert (blocks.values, blocks.count, blocks.low) == ((1, 2), 2, None)
    assert blocks.when == {"model.skip": (True,)}
    assert [each.structural for each in (rate, blocks, skip)] == [False, True, True]
    assert found.notes == ()


def test_a_grid_runs_its_points_and_a_list_its_entries() -> None:
    grid = "parameters: {train.seed: {low: 0, high: 4}, optimizer.lr: [0.1, 0.01]}\n"
    found = planned("search: {sampler: grid}\n" + grid)
    assert (found.trials, found.points, found.parameters[0].count) == (10, 10, 5)
    assert not any(each.structural for each in found.parameters)
    listed = "reference: {source: r, trials: [{}, {params: {optimizer.lr: 0.1}}]}\n"
    assert planned("search: {sampler: reference}\n" + grid + listed).trials == 2
    assert planned("search: {trials: 1}\n").points == 1


def test_large_spaces_are_counted_up_to_a_limit() -> None:
    seeds = "parameters: {train.seed: {low: 0, high: 2147483647}}\n"
    assert planned("search: {trials: 3}\n" + seeds).points == COUNTED


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "search: {trials: 1}\nobjective: {metric: val_accuracy, direction: minimize}",
            "val_accuracy is usually to maximize, but is to minimize here",
        ),
        (
            "search: {trials: 3}\nparameters: {model.skip: [true, false]}",
            "the space has 2 points and the budget 3 trials",
        ),
        (
            "search: {trials: 1}\nreference: {source: r, trials: [{reported: {test_acuracy: 1}}]}",
            "nothing measured; did you mean 'test_accuracy'?",
        ),
        (
            "search: {trials: 1, pruner: {name: asha, min_epochs: 11}}",
            "pruner asha waits for 11 epochs and trials have 10",
        ),
    ],
)
def test_what_looks_like_an_oversight_is_noted(text: str, note: str) -> None:
    notes = planned(text).notes
    assert len(notes) == 1
    assert note in notes[0]

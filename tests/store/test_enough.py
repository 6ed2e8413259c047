"""What is enough of a study before its budget is used up (``search.stop``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sweeper.store import Control, Outcome, Store, StoredStudy, held, progress, queue, studies
from sweeper.store.enough import stop_if_enough

Start = Callable[..., StoredStudy]
Ends = list[float | Outcome]


def end(store: Store, study: StoredStudy, how: float | Outcome) -> None:
    """The next trial completes with this value, or ends otherwise."""
    claimed = queue.claim(store, study.id, "w")
    assert claimed is not None
    completed = not isinstance(how, Outcome)
    outcome = Outcome.COMPLETED if completed else how
    values = [how] if completed else ()
    held.finish(store, study.study, claimed, outcome=outcome, values=values, facts={})


@pytest.mark.parametrize(
    ("stop", "objective", "before", "then", "why"),
    [
        ({"target": 0.9}, "val_accuracy", [0.5, 0.89], 0.9, "val_accuracy of trial 2 is 0.9"),
        ({"target": 0.1}, "val_loss", [0.5, 0.11], 0.1, "val_loss of trial 2 is 0.1"),
        (
            {"patience": 2},
            "val_accuracy",
            [0.1, 0.7, Outcome.CRASHED, 0.7],
            Outcome.PRUNED,
            "2 trials have ended since the val_accuracy of trial 1 was 0.7",
        ),
        ({"patience": 1}, "val_loss", [0.5, 0.4], 0.45, "since the val_loss of trial 1 was 0.4"),
        (
            {"failures": 2, "target": 1.0},
            "val_accuracy",
            [Outcome.CRASHED, 0.5, Outcome.PRUNED],
            Outcome.CRASHED,
            "2 trials have failed",
        ),
    ],
)
def test_no_further_trial_is_begun_once_it_is_enough(
    store: Store,
    started: Start,
    stop: Mapping[str, Any],
    objective: str,
    before: Ends,
    then: float | Outcome,
    why: str,
) -> None:
    study = started(search={"trials": 12, "stop": stop}, objective=objective)
    for how in before:
        end(store, study, how)
        assert stop_if_enough(store, study, progress(store, study)) == ""
        assert studies.control(store, study.id) is Control.RUN
    end(store, study, then)
    reason = stop_if_enough(store, study, progress(store, study))
    assert why in reason
    assert studies.asked(store, study.id) == (Control.STOP, reason)


@pytest.mark.parametrize("stop", [{}, {"target": 0.1}, {"patience": 1}, {"failures": 1}])
def test_nothing_is_enough_before_anything_has_ended(
    store: Store, started: Start, stop: Mapping[str, Any]
) -> None:
    study = started(search={"trials": 4, "stop": stop})
    assert queue.claim(store, study.id, "w") is not None
    assert stop_if_enough(store, study, progress(store, study)) == ""


def test_what_a_person_asked_for_stays(store: Store, started: Start) -> None:
    study = started(search={"trials": 4, "stop": {"target": 0.5}})
    end(store, study, 0.6)
    studies.ask(store, study.id, Control.PAUSE)
    assert stop_if_enough(store, study, progress(store, study))
    assert studies.asked(store, study.id) == (Control.PAUSE, "")


def test_a_study_that_is_over_has_not_stopped_early(store: Store, started: Start) -> None:
    study = started(search={"trials": 1, "stop": {"target": 0.5}})
    end(store, study, 0.6)
    assert stop_if_enough(store, study, progress(store, study)) == ""
    assert studies.control(store, study.id) is Control.RUN

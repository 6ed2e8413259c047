"""A study's plan becomes exactly its trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sweeper.store import Store, StoredStudy, standing, tickets
from sweeper.store import attributes as attr
from sweeper.study.spec import StudySpec

Start = Callable[..., StoredStudy]
REFERENCE: dict[str, Any] = {
    "source": "R0",
    "trials": [
        {"params": {"optimizer.lr": 0.01}, "reported": {"test_accuracy": 0.9}},
        {"params": {"optimizer.lr": 5.0, "train.batch_size": 32}},
    ],
}


def test_a_study_has_exactly_its_budget_waiting(store: Store, started: Start) -> None:
    study = started(search={"trials": 7})
    assert standing(store, study).counts["waiting"] == 7


def test_filling_twice_adds_nothing(store: Store, started: Start) -> None:
    study = started(search={"trials": 7}, reference=REFERENCE)
    planned = tickets.tickets(study.spec, with_reference=True)
    assert tickets.fill(store, study.id, study.spec, planned) == 0
    assert standing(store, study).budget == 9


def test_reference_trials_asked_for_later_are_added(store: Store, started: Start) -> None:
    study = started(search={"trials": 3})
    spec = study.spec.model_validate({**study.spec.model_dump(), "reference": REFERENCE})
    assert tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=True)) == 2


def test_grid_points_that_were_published_run_once(store: Store, started: Start) -> None:
    study = started(
        search={"sampler": "grid"},
        parameters={"optimizer.lr": {"values": [0.01, 0.1]}},
        reference={"source": "R", "trials": [{"params": {"optimizer.lr": 0.1}}]},
    )
    rows = standing(store, study).rows
    assert [row.params["optimizer.lr"] for row in rows] == [0.1, 0.01]
    again = tickets.tickets(study.spec, with_reference=False)
    assert tickets.fill(store, study.id, study.spec, again) == 0


def respelled(study: StoredStudy, **sections: object) -> StudySpec:
    """The study's spec with other sections, as another file of the same study."""
    return StudySpec.model_validate({**study.spec.model_dump(mode="json"), **sections})


def refilled(store: Store, study: StoredStudy, spec: StudySpec, *, with_reference: bool) -> int:
    return tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=with_reference))


def test_a_point_is_the_same_however_its_numbers_are_written(store: Store, started: Start) -> None:
    values = {"optimizer.weight_decay": [0, 1], "train.seed": [0, 1]}
    study = started(search={"sampler": "grid"}, parameters=values)
    spec = respelled(study, parameters={**values, "optimizer.weight_decay": [0.0, 1.0]})
    assert refilled(store, study, spec, with_reference=False) == 0


@pytest.mark.parametrize("numbered", [False, True])
def test_a_published_row_is_told_by_what_it_is_and_not_by_its_place(
    store: Store, started: Start, numbered: bool
) -> None:
    study = started(search={"trials": 1}, reference=REFERENCE)
    if numbered:  # as older versions told them apart
        for trial in store.storage.get_all_trials(study.id)[:2]:
            key = f"reference/{trial.number}"
            store.storage.set_trial_user_attr(trial._trial_id, attr.TICKET, key)
    new = {"params": {"optimizer.lr": 0.09, "model.width": 64}}
    listed = {"source": "R0", "trials": [new, *reversed(REFERENCE["trials"])]}
    spec = respelled(study, reference=listed)
    assert refilled(store, study, spec, with_reference=True) == 1
    assert standing(store, study).rows[-1].params == new["params"]
    assert refilled(store, study, spec, with_reference=True) == 0


def test_a_row_that_is_published_twice_runs_twice(store: Store, started: Start) -> None:
    row = {"params": {"optimizer.lr": 0.01}}
    study = started(search={"trials": 1}, reference={"source": "R", "trials": [row, row]})
    assert standing(store, study).budget == 3
    assert refilled(store, study, study.spec, with_reference=True) == 0


@pytest.mark.parametrize("first", [False, True])
def test_a_grid_runs_a_published_point_once_whenever_it_is_asked_for(
    store: Store, started: Start, first: bool
) -> None:
    study = started(
        search={"sampler": "grid"},
        parameters={"optimizer.lr": {"values": [0.01, 0.1]}},
    )
    reference = {"source": "R", "trials": [{"params": {"optimizer.lr": 0.1, "train.epochs": 10}}]}
    spec = respelled(study, reference=reference)
    for with_reference in (first, not first, first):
        assert refilled(store, study, spec, with_reference=with_reference) == 0
    outside = {"source": "R", "trials": [{"params": {"optimizer.lr": 0.5}}]}
    spec = respelled(study, reference=outside)
    assert refilled(store, study, spec, with_reference=True) == 1
    assert refilled(store, study, spec, with_reference=False) == 0

"""A study's plan becomes exactly its trials."""

from __future__ import annotations

from collections.abc import Callable

from sweeper.store import Store, StoredStudy, standing, tickets

Start = Callable[..., StoredStudy]
REFERENCE = {
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
    assert [row.reference for row in rows] == [0, None]

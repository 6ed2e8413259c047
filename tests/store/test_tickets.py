"""A study's plan becomes exactly its trials."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pytest

from sweeper.store import (
    Store,
    StoredStudy,
    held,
    open_store,
    queue,
    recovery,
    standing,
    tickets,
)
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


def drawn(store: Store, study: StoredStudy, claimed: queue.Claim | None) -> dict[str, Any]:
    assert claimed is not None
    return held.values_of(study.spec, study.study, claimed)


TWO: dict[str, Any] = {
    "optimizer.lr": {"low": 1.0e-4, "high": 0.1, "log": True},
    "model.width": [16, 32, 64],
}


def test_an_enqueued_trial_is_one_more_and_the_next(store: Store, url: str, started: Start) -> None:
    study = started(search={"trials": 3}, parameters=TWO)
    first = queue.claim(store, study.id, "a")
    drawn(store, study, first)
    numbers = [
        tickets.enqueue(store, study.id, study.spec, point)
        for point in ({"model.width": 64}, {"optimizer.lr": 0.01, "model.width": 16})
    ]
    assert numbers == [1, 2]
    assert standing(store, study).budget == 5
    with contextlib.closing(open_store(url)) as another:  # who looks is another process
        rows = standing(another, study).rows
    assert [rows[number].params for number in (1, 2, 3)] == [
        {"model.width": 64},
        {"optimizer.lr": 0.01, "model.width": 16},
        {},
    ]
    found = [drawn(store, study, queue.claim(store, study.id, "a")) for _ in range(4)]
    assert found[0]["model.width"] == 64
    assert 1.0e-4 <= found[0]["optimizer.lr"] <= 0.1
    assert found[1] == {"optimizer.lr": 0.01, "model.width": 16}
    assert queue.claim(store, study.id, "a") is None
    assert refilled(store, study, study.spec, with_reference=False) == 0


def test_a_trial_of_which_something_is_decided_stays_what_it_is(
    store: Store, started: Start
) -> None:
    """One was begun and put back, and where nothing else waits the new one comes last."""
    study = started(search={"trials": 1}, parameters=TWO)
    begun = queue.claim(store, study.id, "a")
    values = drawn(store, study, begun)
    assert begun is not None
    held.put_back(store, begun)
    assert tickets.enqueue(store, study.id, study.spec, {"model.width": 64}) == 1
    assert drawn(store, study, queue.claim(store, study.id, "a")) == values
    assert drawn(store, study, queue.claim(store, study.id, "a"))["model.width"] == 64


def test_a_trial_whose_worker_died_while_it_was_drawn_keeps_what_was_drawn(
    store: Store, started: Start
) -> None:
    """Optuna would take what is stored before what a person gives."""
    study = started(search={"trials": 1, "sampler": "random"}, parameters=TWO)
    half = queue.claim(store, study.id, "dead")
    assert half is not None
    study.study.get_trials()  # for the cache, as the worker does
    optuna.Trial(study.study, half.trial_id).suggest_float("optimizer.lr", 1.0e-4, 0.1, log=True)
    assert recovery.lose_trials_of(store, study.id, "dead")
    with store.exclusively():
        recovery.reconcile(store, study.id, study.spec)
    point = {"optimizer.lr": 0.05, "model.width": 64}
    number = tickets.enqueue(store, study.id, study.spec, point)
    claims = [queue.claim(store, study.id, "a") for _ in range(2)]
    found = {each.number: drawn(store, study, each) for each in claims if each}
    assert found.pop(number) == point
    (other,) = found.values()
    assert other["optimizer.lr"] != 0.05


def test_an_enqueued_trial_that_is_lost_keeps_its_values(store: Store, started: Start) -> None:
    """Its worker died before the sampler was asked."""
    study = started(search={"trials": 1}, parameters=TWO)
    tickets.enqueue(store, study.id, study.spec, {"model.width": 64})
    lost = queue.claim(store, study.id, "dead")
    assert recovery.lose_trials_of(store, study.id, "dead")
    with store.exclusively():
        recovery.reconcile(store, study.id, study.spec)
    claims = [queue.claim(store, study.id, "a") for _ in range(2)]
    again = next(each for each in claims if each and lost and each.origin == lost.number)
    assert again.attempt == 2
    assert drawn(store, study, again)["model.width"] == 64
    assert standing(store, study).budget == 2


def test_what_is_known_of_a_studys_trials_is_told(store: Store, started: Start) -> None:
    study = started(search={"trials": 2}, parameters=TWO, reference=REFERENCE)
    point = {"optimizer.lr": 0.02, "model.width": 32}
    assert not tickets.known(store, study.id, study.spec, point)
    tickets.enqueue(store, study.id, study.spec, point)
    assert tickets.known(store, study.id, study.spec, dict(reversed(point.items())))
    tickets.enqueue(store, study.id, study.spec, {"optimizer.lr": 0.03})
    base = study.spec.trial_config({}).model.model_dump()["width"]
    assert not tickets.known(
        store, study.id, study.spec, {"optimizer.lr": 0.03, "model.width": base}
    )
    default = study.spec.trial_config({}).model.model_dump()["width"]
    assert tickets.known(
        store, study.id, study.spec, {"optimizer.lr": 0.01, "model.width": default}
    )


def test_many_at_once_lose_no_trial(store: Store, started: Start) -> None:
    study = started(search={"trials": 8}, parameters=TWO)
    points = [{"optimizer.lr": lr / 1000} for lr in range(1, 9)]
    taken: list[queue.Claim | None] = []

    def enqueue() -> None:
        for point in points:
            tickets.enqueue(store, study.id, study.spec, point)

    def take() -> None:
        taken.extend(queue.claim(store, study.id, "a") for _ in range(8))

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(enqueue), pool.submit(take)]:
            done.result()
    taken.extend(queue.claim(store, study.id, "a") for _ in range(9))
    claims = [claimed for claimed in taken if claimed is not None]
    assert sorted(claimed.number for claimed in claims) == list(range(16))
    found = [drawn(store, study, claimed)["optimizer.lr"] for claimed in claims]
    assert sorted(lr for lr in found if {"optimizer.lr": lr} in points) == [
        point["optimizer.lr"] for point in points
    ]

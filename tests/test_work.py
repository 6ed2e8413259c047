"""Which trial a worker takes next."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from sweeper.errors import StudyNotFoundError, TrialLostError
from sweeper.store import (
    Control,
    Outcome,
    Store,
    held,
    open_store,
    queue,
    recovery,
    standing,
    studies,
    tickets,
)
from sweeper.store import attributes as attr
from sweeper.study.spec import StudySpec
from sweeper.worker.work import Rest, Work

BASE = {
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "search": {"trials": 1},
    "parameters": {"optimizer.lr": {"low": 1.0e-4, "high": 0.1, "log": True}},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"sqlite:///{tmp_path}/optuna.db")


def add(store: Store, name: str, *, faults: Any = None, **resources: Any) -> int:
    sections = {"resources": resources, "faults": faults or {}}
    spec = StudySpec.model_validate({**BASE, "name": name, **sections})
    with store.exclusively():
        study = studies.create(store, spec)
        if study is None:
            raise ValueError(f"{name} is there already")
        tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=False))
    return study.id


def taken(work: Work) -> str | Rest:
    found = work.next()
    return found if isinstance(found, Rest) else found[0].name


def test_the_highest_priority_comes_first_and_among_equals_the_oldest(store: Store) -> None:
    for name, priority in (("old", 0), ("urgent", 5), ("young", 0), ("spare", -5)):
        add(store, name, priority=priority)
    work = Work(store=store, worker="me")
    assert [taken(work) for _ in range(5)] == ["urgent", "old", "young", "spare", Rest.WAIT]


def test_paused_studies_and_those_that_cannot_be_trained_here_are_left_aside(store: Store) -> None:
    paused, barred = add(store, "paused", priority=9), add(store, "barred", priority=8)
    add(store, "good")
    studies.ask(store, paused, Control.PAUSE)
    work = Work(store=store, worker="me")
    work.bar(studies.load_by_id(store, barred))
    assert [taken(work), taken(work)] == ["good", Rest.WAIT]
    studies.ask(store, paused, Control.RUN)
    assert taken(work) == "paused"


def test_a_study_that_appears_is_picked_up_and_idle_looks_become_rare(store: Store) -> None:
    work = Work(store=store, worker="me")
    assert taken(work) is Rest.WAIT
    first = work.pause_s()
    for _ in range(10):
        assert taken(work) is Rest.WAIT
    assert first <= 0.5 < 2.5 <= work.pause_s() <= 5
    add(store, "new")
    assert taken(work) == "new"


def test_a_worker_of_one_study_ends_with_it(store: Store) -> None:
    study_id = add(store, "one")
    add(store, "another")
    work = Work(store=store, worker="me", study="one")
    assert taken(work) == "one"
    assert taken(work) is Rest.WAIT
    studies.ask(store, study_id, Control.STOP)
    assert taken(work) is Rest.OVER


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds that have passed, for everybody who asks; a wait is an addition."""
    passed, began, monotonic = [0.0], time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: began + passed[0])
    monkeypatch.setattr(time, "monotonic", lambda: monotonic + passed[0])
    yield passed


@pytest.mark.parametrize("lost_after_s", [6, 20, 29, 60, 300])
@pytest.mark.parametrize("finished", [False, True])
def test_an_idle_worker_finds_the_trials_of_lost_ones(
    store: Store,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    lost_after_s: int,
    finished: bool,
) -> None:
    random.seed(0)
    study_id = add(store, "one", faults={"heartbeat_s": 2, "lost_after_s": lost_after_s})
    study = studies.load_by_id(store, study_id)
    if finished:  # once, and then it was given more
        claimed = queue.claim(store, study_id, "first")
        assert claimed is not None
        held.finish(store, study.study, claimed, outcome=Outcome.COMPLETED, values=[0.5])
        studies.remember_finished(store, study_id, standing(store, study).counts)
        more = [tickets.Ticket(key="more", values={})]
        with store.exclusively():
            tickets.fill(store, study_id, study.spec, more)
    lost = queue.claim(store, study_id, "dead")
    assert lost is not None
    monkeypatch.setattr(recovery, "_silent_ids", lambda *_: [lost.trial_id])
    work, waited = Work(store=store, worker="me"), 0.0
    while taken(work) is Rest.WAIT:
        clock[0] += (pause := work.pause_s())
        waited += pause
        assert waited < 60, "nobody looks after the study"


def test_a_study_that_cannot_be_read_or_was_deleted_keeps_no_other_waiting(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    newer, gone = add(store, "newer", priority=9), add(store, "gone", priority=8)
    add(store, "good")
    work = Work(store=store, worker="me")
    for study_id in (newer, gone):
        assert queue.claim(store, study_id, "a") is not None
    study = studies.load_by_id(store, newer).study
    spec = json.loads(study.user_attrs[attr.SPEC])
    study.set_user_attr(attr.SPEC, json.dumps({**spec, "hindsight": True}))
    deleted = studies.load_by_id(store, gone)
    optuna.delete_study(study_name="gone", storage=store.storage)
    with caplog.at_level(logging.WARNING):
        assert [taken(work), taken(work)] == ["good", Rest.WAIT]
    assert "'newer' in the store must be one that this version" in caplog.text
    assert work.another(deleted) is None


def test_a_trial_that_was_deleted_is_lost_to_its_worker(store: Store) -> None:
    study = studies.load_by_id(store, add(store, "gone"))
    claimed = queue.claim(store, study.id, "me")
    assert claimed is not None
    optuna.delete_study(study_name="gone", storage=store.storage)
    for act in (
        lambda: held.report(store, claimed, 1, 0.5),
        lambda: held.put_back(store, claimed),
        lambda: held.note(store, claimed, {attr.PARAMETERS: 1}),
        lambda: held.values_of(study.spec, study.study, claimed),
        lambda: held.finish(store, study.study, claimed, outcome=Outcome.CRASHED),
    ):
        with pytest.raises(TrialLostError):
            act()
    with pytest.raises(StudyNotFoundError, match="deleted"):
        studies.control(store, study.id)

"""Which trial a worker takes next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeper.store import Control, Store, open_store, studies, tickets
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


def add(store: Store, name: str, **resources: Any) -> int:
    spec = StudySpec.model_validate({**BASE, "name": name, "resources": resources})
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

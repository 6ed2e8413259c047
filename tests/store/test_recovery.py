"""Whatever becomes of workers, every trial of the budget ends once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import event

from sweeper.errors import TrialLostError
from sweeper.store import Outcome, Store, StoredStudy, held, queue, recovery, standing
from sweeper.store import attributes as attr

Start = Callable[..., StoredStudy]


def silence(store: Store, seconds: float = 1000) -> None:
    """Move every heartbeat into the past, as if the workers had died long ago."""
    from datetime import timedelta

    from optuna.storages._rdb import models

    with store.backend.scoped_session() as session, session.begin():
        for beat in session.query(models.TrialHeartbeatModel).all():
            beat.heartbeat = beat.heartbeat - timedelta(seconds=seconds)


def test_a_silent_worker_loses_its_trial_to_one_successor(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    claimed = queue.claim(store, study.id, "dead")
    assert claimed is not None
    point = held.values_of(study.spec, study.study, claimed)
    assert recovery.reap(store, study.id, lost_after_s=60) == []
    silence(store)
    assert recovery.reap(store, study.id, lost_after_s=60) == [0]
    for _ in range(3):  # whoever calls it, however often
        with store.exclusively():
            recovery.reconcile(store, study.id, study.spec)
    now = standing(store, study)
    assert now.counts == {
        "complete": 0, "pruned": 0, "failed": 0, "running": 0, "waiting": 2, "retried": 1,
    }  # fmt: skip
    successor = now.rows[-1]
    assert (successor.origin, successor.attempt, successor.params) == (0, 2, point)


def test_a_worker_back_from_the_dead_cannot_write(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "zombie")
    assert claimed is not None
    silence(store)
    recovery.reap(store, study.id, lost_after_s=60)
    with pytest.raises(TrialLostError):
        held.finish(store, study.study, claimed, outcome=Outcome.COMPLETED, values=[1.0])
    with pytest.raises(TrialLostError):
        held.put_back(store, claimed)
    assert standing(store, study).rows[0].outcome == "lost"


def test_retries_end(store: Store, started: Start) -> None:
    study = started(search={"trials": 1}, faults={"retries": 2})
    for _ in range(3):
        assert queue.claim(store, study.id, "dead") is not None
        assert len(recovery.lose_trials_of(store, study.id, "dead")) == 1
        with store.exclusively():
            recovery.reconcile(store, study.id, study.spec)
    assert queue.claim(store, study.id, "dead") is None
    assert standing(store, study).counts["failed"] == 1
    with store.exclusively():
        assert len(recovery.retry(store, study.id)) == 1
    assert standing(store, study).counts["waiting"] == 1


@pytest.mark.parametrize(
    ("outcome", "faults", "attempts"),
    [
        (Outcome.OUT_OF_MEMORY, {}, 2),
        (Outcome.OUT_OF_MEMORY, {"on_out_of_memory": "fail"}, 1),
        (Outcome.CRASHED, {}, 1),
        (Outcome.CRASHED, {"crash_retries": 2}, 3),
        (Outcome.INVALID, {"crash_retries": 2}, 1),
    ],
)
def test_a_failed_trial_is_tried_again_as_its_policy_says(
    store: Store, started: Start, outcome: Outcome, faults: dict[str, object], attempts: int
) -> None:
    study = started(search={"trials": 1}, faults=faults)
    for attempt in range(1, attempts + 1):
        claimed = queue.claim(store, study.id, "a")
        assert claimed is not None
        assert claimed.failures(outcome) == attempt - 1
        held.finish(store, study.study, claimed, outcome=outcome, facts={attr.ERROR: "why"})
        assert standing(store, study).over is (attempt == attempts)  # before anybody reconciles
        with store.exclusively():
            recovery.reconcile(store, study.id, study.spec)
    assert queue.claim(store, study.id, "a") is None
    now = standing(store, study)
    assert (now.counts["failed"], now.counts["retried"], now.budget) == (1, attempts - 1, 1)
    assert now.rows[-1].outcome == outcome
    assert now.outcomes == {str(outcome): attempts}


def test_preemption_does_not_use_up_the_retries_of_a_loss(store: Store, started: Start) -> None:
    study = started(search={"trials": 1}, faults={"retries": 1})
    for _ in range(5):
        claimed = queue.claim(store, study.id, "a")
        assert claimed is not None
        held.put_back(store, claimed)
    assert queue.claim(store, study.id, "a") is not None
    recovery.lose_trials_of(store, study.id, "a")
    with store.exclusively():
        assert len(recovery.reconcile(store, study.id, study.spec)) == 1


def test_nobody_counts_as_lost_to_who_was_away_himself(
    store: Store, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = started(search={"trials": 1}, faults={"heartbeat_s": 10, "lost_after_s": 60})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    silence(store)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    lookout = recovery.Lookout(study.spec.faults)

    def looked(after_s: float) -> list[int]:
        nonlocal now
        now += after_s
        return lookout.reap(store, study.id)

    assert looked(0) == looked(10) == []
    assert looked(100) == []  # a break: it begins anew
    assert looked(10) == looked(10) == []
    assert looked(-3600) == looked(10) == looked(10) == []  # somebody has set the clock
    assert looked(10) == [0]


def test_a_beat_keeps_a_trial(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    silence(store)
    held.beat(store, [claimed])
    assert recovery.reap(store, study.id, lost_after_s=60) == []


def test_beats_of_many_trials_are_one_transaction(store: Store, started: Start) -> None:
    """Also where one was deleted meanwhile; a trial of nobody's stays silent."""
    study = started(search={"trials": 4})
    claims = [queue.claim(store, study.id, "a") for _ in range(4)]
    beaten = [claimed for claimed in claims[:3] if claimed is not None]
    gone = replace(beaten[0], trial_id=beaten[0].trial_id + 1000)
    silence(store)
    commits: list[object] = []
    event.listen(store.backend.engine, "commit", commits.append)
    held.beat(store, [gone, *beaten])
    assert len(commits) == 1
    assert recovery.reap(store, study.id, lost_after_s=60) == [3]

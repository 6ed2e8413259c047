"""The queue: exact whatever happens to workers."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable

import pytest

from sweeper.errors import TrialLostError
from sweeper.store import Outcome, Store, StoredStudy, open_store, queue, standing, studies
from sweeper.store import attributes as attr

Start = Callable[..., StoredStudy]
REFERENCE = {
    "source": "R0",
    "trials": [
        {"params": {"optimizer.lr": 0.01}, "reported": {"test_accuracy": 0.9}},
        {"params": {"optimizer.lr": 5.0, "train.batch_size": 32}},
    ],
}


def complete(store: Store, study: StoredStudy, claimed: queue.Claim, value: float = 1.0) -> None:
    queue.finish(
        store,
        study.study,
        claimed,
        outcome=Outcome.COMPLETED,
        values=[value],
    )


def silence(store: Store, seconds: float = 1000) -> None:
    """Move every heartbeat into the past, as if the workers had died long ago."""
    from datetime import timedelta

    from optuna.storages._rdb import models

    with store.backend.scoped_session() as session, session.begin():
        for beat in session.query(models.TrialHeartbeatModel).all():
            beat.heartbeat = beat.heartbeat - timedelta(seconds=seconds)


def test_a_study_has_exactly_its_budget_waiting(store: Store, started: Start) -> None:
    study = started(search={"trials": 7})
    assert standing(store, study).counts["waiting"] == 7


def test_filling_twice_adds_nothing(store: Store, started: Start) -> None:
    study = started(search={"trials": 7}, reference=REFERENCE)
    planned = queue.tickets(study.spec, with_reference=True)
    assert queue.fill(store, study.id, study.spec, planned) == 0
    assert standing(store, study).budget == 9


def test_reference_trials_asked_for_later_are_added(store: Store, started: Start) -> None:
    study = started(search={"trials": 3})
    spec = study.spec.model_validate({**study.spec.model_dump(), "reference": REFERENCE})
    assert queue.fill(store, study.id, spec, queue.tickets(spec, with_reference=True)) == 2


def test_grid_points_that_were_published_run_once(store: Store, started: Start) -> None:
    study = started(
        search={"sampler": "grid"},
        parameters={"optimizer.lr": {"values": [0.01, 0.1]}},
        reference={"source": "R", "trials": [{"params": {"optimizer.lr": 0.1}}]},
    )
    rows = standing(store, study).rows
    assert [row.params["optimizer.lr"] for row in rows] == [0.1, 0.01]
    assert [row.reference for row in rows] == [0, None]


def test_claims_are_in_order_and_end_when_nothing_waits(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    first = queue.claim(store, study.id, "a")
    second = queue.claim(store, study.id, "a")
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (0, 1)
    assert queue.claim(store, study.id, "a") is None


def test_published_values_outside_the_space_are_kept(store: Store, started: Start) -> None:
    study = started(search={"trials": 1}, reference=REFERENCE)
    points = []
    while claimed := queue.claim(store, study.id, "a"):
        points.append(queue.values_of(study.spec, study.study, claimed))
    assert points[0] == {"optimizer.lr": 0.01}
    assert points[1] == {"optimizer.lr": 5.0, "train.batch_size": 32}
    assert 1e-4 <= points[2]["optimizer.lr"] <= 0.1


def test_a_drawn_point_stays_when_the_trial_is_put_back(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    point = queue.values_of(study.spec, study.study, claimed)
    store.storage.set_trial_intermediate_value(claimed.trial_id, 2, 0.5)
    queue.put_back(store, claimed)
    again = queue.claim(store, study.id, "b")
    assert again is not None
    assert (again.number, again.attempt) == (0, 2)
    assert queue.values_of(study.spec, study.study, again) == point


def test_a_silent_worker_loses_its_trial_to_one_successor(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    claimed = queue.claim(store, study.id, "dead")
    assert claimed is not None
    point = queue.values_of(study.spec, study.study, claimed)
    assert queue.reap(store, study.id, lost_after_s=60) == []
    silence(store)
    assert queue.reap(store, study.id, lost_after_s=60) == [0]
    for _ in range(3):  # whoever calls it, however often
        with store.exclusively():
            queue.reconcile(store, study.id, study.spec)
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
    queue.reap(store, study.id, lost_after_s=60)
    with pytest.raises(TrialLostError):
        complete(store, study, claimed)
    with pytest.raises(TrialLostError):
        queue.put_back(store, claimed)
    assert standing(store, study).rows[0].outcome == "lost"


def test_retries_end(store: Store, started: Start) -> None:
    study = started(search={"trials": 1}, faults={"retries": 2})
    for _ in range(3):
        assert queue.claim(store, study.id, "dead") is not None
        assert len(queue.lose_trials_of(store, study.id, "dead")) == 1
        with store.exclusively():
            queue.reconcile(store, study.id, study.spec)
    assert queue.claim(store, study.id, "dead") is None
    assert standing(store, study).counts["failed"] == 1
    with store.exclusively():
        assert len(queue.retry(store, study.id)) == 1
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
        queue.finish(store, study.study, claimed, outcome=outcome, facts={attr.ERROR: "why"})
        assert standing(store, study).over is (attempt == attempts)  # before anybody reconciles
        with store.exclusively():
            queue.reconcile(store, study.id, study.spec)
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
        queue.put_back(store, claimed)
    assert queue.claim(store, study.id, "a") is not None
    queue.lose_trials_of(store, study.id, "a")
    with store.exclusively():
        assert len(queue.reconcile(store, study.id, study.spec)) == 1


def test_finishing_twice_is_finishing_once(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    complete(store, study, claimed, 0.5)
    complete(store, study, claimed, 0.5)  # the answer to the first was lost
    assert standing(store, study).rows[0].values == (0.5,)


def test_what_another_worker_has_by_now_is_not_put_back(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    first = queue.claim(store, study.id, "a")
    assert first is not None
    queue.put_back(store, first)
    second = queue.claim(store, study.id, "b")
    assert second is not None
    with pytest.raises(TrialLostError):
        queue.put_back(store, first)
    with pytest.raises(TrialLostError):
        complete(store, study, first)
    complete(store, study, second)


def test_nobody_counts_as_lost_to_who_was_away_himself(
    store: Store, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = started(search={"trials": 1}, faults={"heartbeat_s": 10, "lost_after_s": 60})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    silence(store)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    lookout = queue.Lookout(study.spec.faults)

    def looked(after_s: float) -> list[int]:
        nonlocal now
        now += after_s
        return lookout.reap(store, study.id)

    assert looked(0) == looked(10) == []
    assert looked(100) == []  # a break: it begins anew
    assert looked(10) == looked(10) == []
    assert looked(10) == [0]


def test_the_pruner_does_not_look_ahead(store: Store, started: Start) -> None:
    study = started(search={"trials": 1, "pruner": {"name": "threshold", "lower": 0.5}})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    told = {1: 0.9, 2: 0.1}
    for epoch, value in told.items():
        queue.report(store, claimed, epoch, value)
    assert not queue.should_prune(store, study.study, claimed, 1, told)
    assert queue.should_prune(store, study.study, claimed, 2, told)


def test_the_pruner_knows_what_was_told_a_moment_ago(store: Store, started: Start) -> None:
    study = started(
        search={"trials": 1, "pruner": {"name": "threshold", "lower": 0.5, "min_epochs": 1}}
    )
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    with store.storage.recent(60):
        store.storage.get_all_trials(study.id, deepcopy=False)  # read before the report
        queue.report(store, claimed, 1, 0.1)
        assert not queue.should_prune(store, study.study, claimed, 1, {})
        assert queue.should_prune(store, study.study, claimed, 1, {1: 0.1})


def test_a_beat_keeps_a_trial(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    silence(store)
    queue.beat(store, claimed)
    assert queue.reap(store, study.id, lost_after_s=60) == []


def _work(url: str, name: str, ended: multiprocessing.Queue[int]) -> None:
    store = open_store(url)
    study = studies.load(store, name)
    while claimed := queue.claim(store, study.id, multiprocessing.current_process().name):
        queue.values_of(study.spec, study.study, claimed)
        complete(store, study, claimed)
        ended.put(claimed.number)


def test_eight_processes_end_forty_trials_once_each(store: Store, url: str, started: Start) -> None:
    study = started(search={"trials": 40, "sampler": "random"})
    context = multiprocessing.get_context("spawn")
    ended: multiprocessing.Queue[int] = context.Queue()
    workers = [context.Process(target=_work, args=(url, study.name, ended)) for _ in range(8)]
    for worker in workers:
        worker.start()
    numbers = [ended.get(timeout=120) for _ in range(40)]
    for worker in workers:
        worker.join(60)
    time.sleep(0.2)
    assert ended.empty()
    assert Counter(numbers) == Counter(range(40))
    assert standing(store, study).counts["complete"] == 40
    assert len({row.worker for row in standing(store, study).rows}) > 1


def test_facts_are_stored_before_the_state(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    queue.finish(
        store,
        study.study,
        claimed,
        outcome=Outcome.CRASHED,
        facts={attr.ERROR: "x" * 20_000, attr.METRICS: {"test_accuracy": 0.5}},
    )
    row = standing(store, study).rows[0]
    assert row.outcome == "crashed"
    assert row.metrics == {"test_accuracy": 0.5}
    assert len(row.error or "") == 8000

"""Who works on a store, and how all its studies stand, without a trial being loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sqlalchemy import text

from sweeper.store import (
    Control,
    Outcome,
    Store,
    StoredStudy,
    held,
    overview,
    queue,
    recovery,
    standing,
    studies,
    workers,
)
from sweeper.store.workers import Presence

Start = Callable[..., StoredStudy]
ME = Presence(name="me", host="here", pid=7, device="cpu", launcher="local")


def silence(store: Store, name: str, seconds: int) -> None:
    """Let a worker's last heartbeat be so long ago."""
    ago = (
        f"datetime(seen, '-{seconds} seconds')"
        if store.url.get_backend_name() == "sqlite"
        else f"seen - interval '{seconds} seconds'"
    )
    with store.backend.engine.begin() as connection:
        update = f"UPDATE sweeper_workers SET seen = {ago} WHERE name = :name"
        connection.execute(text(update), {"name": name})


def test_a_worker_is_listed_as_it_last_said(store: Store) -> None:
    assert workers.listed(store) == []
    workers.tell(store, ME)
    busy = dataclasses.replace(ME, study="study", trials=(3, 5), samples_per_s=120.5)
    workers.tell(store, busy)
    (row,) = workers.listed(store)
    assert row.presence == busy
    assert row.alive
    assert 0 <= row.silent_s < 30
    assert row.public()["trials"] == (3, 5)
    workers.leave(store, "me")
    assert workers.listed(store) == []


def test_who_is_silent_is_not_alive_and_after_a_day_forgotten(store: Store) -> None:
    for name in ("lively", "silent", "forgotten"):
        workers.tell(store, dataclasses.replace(ME, name=name))
    silence(store, "silent", 120)
    silence(store, "forgotten", 90_000)
    assert workers.sweep(store) == 1
    alive = {row.presence.name: row.alive for row in workers.listed(store)}
    assert alive == {"lively": True, "silent": False}


def test_the_tally_counts_as_the_standing_does(store: Store, started: Start) -> None:
    study = started(search={"trials": 5})
    started(name="other", search={"trials": 2})
    for worker, outcome in (("a", Outcome.COMPLETED), ("b", Outcome.PRUNED), ("c", None)):
        claimed = queue.claim(store, study.id, worker)
        assert claimed is not None
        if outcome is not None:
            values = [0.5] if outcome is Outcome.COMPLETED else []
            held.finish(store, study.study, claimed, outcome=outcome, values=values)
    recovery.lose_trials_of(store, study.id, "c")
    with store.exclusively():
        recovery.reconcile(store, study.id, study.spec)
    assert queue.claim(store, study.id, "d") is not None
    first, second = overview.tallies(store)
    assert (first.name, second.name) == ("study", "other")
    assert dict(first.counts) == standing(store, study).counts
    assert first.counts["retried"] == 1
    assert (first.budget, second.budget) == (5, 2)
    assert (first.busy, first.finished) == (True, None)


def test_only_studies_with_a_waiting_trial_are_queued(store: Store, started: Start) -> None:
    one, two = started(name="one", search={"trials": 1}), started(name="two", search={"trials": 1})
    assert overview.queued(store) == [one.id, two.id]
    assert queue.claim(store, one.id, "a") is not None
    assert overview.queued(store) == [two.id]


def test_the_reason_of_a_stop_stays_until_something_else_is_asked(
    store: Store, started: Start
) -> None:
    study = started()
    studies.ask(store, study.id, Control.STOP, why="all crash")
    assert studies.asked(store, study.id) == (Control.STOP, "all crash")
    studies.ask(store, study.id, Control.RUN)
    assert studies.asked(store, study.id) == (Control.RUN, "")


def test_a_study_is_finished_as_it_stands_and_not_as_it_stood(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    counts = standing(store, study).counts
    assert not studies.finished(store, study.id, counts)
    studies.remember_finished(store, study.id, counts)
    assert studies.finished(store, study.id, counts)
    assert overview.tallies(store)[0].finished == counts
    assert queue.claim(store, study.id, "a") is not None
    assert not studies.finished(store, study.id, standing(store, study).counts)


def test_one_process_at_a_time_may_finish_a_study(store: Store, started: Start) -> None:
    study = started()
    with store.alone(study.id) as first, store.alone(study.id) as second:
        assert (first, second) == (True, False)
        with store.alone(study.id + 1) as other:
            assert other
    with store.alone(study.id) as again:
        assert again

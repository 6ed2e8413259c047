"""What is read anew, and what is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from sweeper.errors import TrialLostError
from sweeper.store import Outcome, Store, StoredStudy, held, open_store, queue, tables

Start = Callable[..., StoredStudy]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the trials that each bulk read read."""
    found: list[list[int]] = []
    original = tables.read

    def read(connection: Any, ids: Iterable[int], *known: Any) -> Any:
        trials = original(connection, ids, *known)
        found.append([trial.number for trial in trials])
        return trials

    monkeypatch.setattr(tables, "read", read)
    return found


def numbers_and_states(store: Store, study: StoredStudy) -> list[tuple[int, str]]:
    found = store.storage.get_all_trials(study.id, deepcopy=False)
    return [(trial.number, trial.state.name) for trial in found]


def test_a_look_reads_what_runs_and_what_has_changed(
    store: Store, started: Start, reads: list[list[int]]
) -> None:
    study = started(search={"trials": 5})
    numbers_and_states(store, study)
    first = queue.claim(store, study.id, "a")
    second = queue.claim(store, study.id, "a")
    assert first is not None
    assert second is not None
    reads.clear()
    numbers_and_states(store, study)
    numbers_and_states(store, study)
    assert reads == [[0, 1], [0, 1]]
    held.finish(store, study.study, first, outcome=Outcome.COMPLETED, values=[1.0])
    reads.clear()
    numbers_and_states(store, study)
    numbers_and_states(store, study)
    assert reads == [[0, 1], [1]]


def test_a_trial_that_was_put_back_is_seen_as_it_is(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    assert numbers_and_states(store, study) == [(0, "RUNNING"), (1, "WAITING")]
    other = open_store(store.url.render_as_string(hide_password=False))
    held.put_back(other, claimed)
    assert numbers_and_states(store, study) == [(0, "WAITING"), (1, "WAITING")]
    again = queue.claim(other, study.id, "b")
    assert again is not None
    held.put_back(other, again)
    other.close()
    kept = store.storage.get_all_trials(study.id, deepcopy=False)[0]
    assert kept.user_attrs["sweeper.attempt"] == 3


def test_ends_out_of_order_and_new_trials_are_seen(store: Store, started: Start) -> None:
    from sweeper.store import tickets

    study = started(search={"trials": 3})
    claims = [queue.claim(store, study.id, "a") for _ in range(3)]
    numbers_and_states(store, study)
    assert claims[1] is not None
    held.finish(store, study.study, claims[1], outcome=Outcome.CRASHED)
    with store.exclusively():
        more = [tickets.Ticket(key="more")] * 2
        assert tickets.fill(store, study.id, study.spec, more) == 2
    assert numbers_and_states(store, study) == [
        (0, "RUNNING"), (1, "FAIL"), (2, "RUNNING"), (3, "WAITING"), (4, "WAITING"),
    ]  # fmt: skip


def test_a_random_sampler_reads_no_trial_but_its_own(
    store: Store, started: Start, reads: list[list[int]]
) -> None:
    study = started(search={"trials": 5, "sampler": "random"})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    held.values_of(study.spec, study.study, claimed)
    assert {number for read in reads for number in read} == {0}


def test_a_report_is_what_optuna_itself_would_have_stored(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    ours, theirs = (queue.claim(store, study.id, "a") for _ in range(2))
    assert ours is not None
    assert theirs is not None
    said = [(1, 0.25), (2, math.inf), (3, -math.inf), (4, math.nan), (1, 0.5)]
    for epoch, value in said:
        held.report(store, ours, epoch, value)
        store.backend.set_trial_intermediate_value(theirs.trial_id, epoch, value)
    found, wanted = (store.backend.get_trial(claimed.trial_id) for claimed in (ours, theirs))
    assert found.intermediate_values == pytest.approx(wanted.intermediate_values, nan_ok=True)
    assert found.intermediate_values[1] == 0.5


def test_a_report_of_a_trial_that_was_deleted_is_refused(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(store, study.id, "a")
    assert claimed is not None
    store.storage.delete_study(study.id)
    with pytest.raises(TrialLostError):
        held.report(store, claimed, 1, 0.5)

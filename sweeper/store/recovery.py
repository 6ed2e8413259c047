"""Recovery: whose worker is silent loses its trial, and a new one takes its place.

Whoever looks may do all of this at any time, twice or at once with another: ending a trial is a
compare-and-set, and successors are added under the store's lock.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeper.errors import StoreUnreachableError
from sweeper.store import attributes as attr
from sweeper.store import tables
from sweeper.store.attributes import Outcome
from sweeper.store.database import Store
from sweeper.store.refusals import reaching
from sweeper.store.tables import BEATS, FACTS, TRIALS
from sweeper.study.spec import Faults, StudySpec

_OPTIMIZER: Final = "cma:optimizer"


def reap(store: Store, study_id: int, *, lost_after_s: float) -> list[int]:
    """End every running trial whose worker has been silent too long; their numbers."""
    lost = []
    with reaching(store.url):
        for trial_id in _silent_ids(store, study_id, lost_after_s):
            if _lose(store, trial_id):
                lost.append(store.storage.get_trial(trial_id).number)
    return lost


class Lookout:
    """Looks for silent workers, but not before it has heard the others for a while itself.

    After an outage of the store, or of this process, everybody has been silent. So nobody counts as
    lost until this process has reached the store for two heartbeats without a break.
    """

    def __init__(self, faults: Faults) -> None:
        self._lost_after_s = faults.lost_after_s
        self._settle_s = 2.0 * faults.heartbeat_s + 1.0
        self._since: float | None = None
        self._last = 0.0

    def reap(self, store: Store, study_id: int) -> list[int]:
        """As :func:`reap`, once there is reason to believe what is seen."""
        began = time.time()
        if not 0 <= began - self._last <= self._lost_after_s / 2:  # less than 0: the clock was set
            self._since = None
        try:
            with reaching(store.url):
                _silent_ids(store, study_id, self._lost_after_s)
        except StoreUnreachableError:
            self._since = None
            raise
        self._last = time.time()
        if self._since is None or self._last - began > self._settle_s:
            self._since = self._last
        if self._last - self._since < self._settle_s:
            return []
        return reap(store, study_id, lost_after_s=self._lost_after_s)


def lose_trials_of(store: Store, study_id: int, worker: str) -> list[int]:
    """End the running trials of a worker that is known to be dead; their numbers."""
    with reaching(store.url):
        running = _running_of(store, study_id, worker)
        return [number for trial_id, number in running.items() if _lose(store, trial_id)]


def return_trials_of(store: Store, study_id: int, worker: str) -> list[int]:
    """Put the running trials of a worker that was ended on purpose back; their numbers."""
    returned = []
    with reaching(store.url):
        for trial_id, number in _running_of(store, study_id, worker).items():
            with contextlib.suppress(UpdateFinishedTrialError):
                store.storage.set_trial_state_values(trial_id, TrialState.WAITING)
                returned.append(number)
    return returned


def _running_of(store: Store, study_id: int, worker: str) -> dict[int, int]:
    """The trials that a worker has: id → number."""
    query = (
        sqlalchemy.select(TRIALS.c.trial_id, TRIALS.c.number)
        .join(FACTS, FACTS.c.trial_id == TRIALS.c.trial_id)
        .where(
            TRIALS.c.study_id == study_id,
            TRIALS.c.state == TrialState.RUNNING,
            FACTS.c.key == attr.WORKER,
            FACTS.c.value_json == json.dumps(worker),
        )
    )
    with store.reading() as connection:
        return {row.trial_id: row.number for row in connection.execute(query)}


def _lose(store: Store, trial_id: int) -> bool:
    try:
        store.storage.set_trial_user_attr(trial_id, attr.OUTCOME, str(Outcome.LOST))
        return store.storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def _silent_ids(store: Store, study_id: int, lost_after_s: float) -> list[int]:
    """Running trials without a beat for ``lost_after_s``, by the database's own clock."""
    query = (
        sqlalchemy.select(TRIALS.c.trial_id, BEATS.c.heartbeat)
        .join(BEATS, BEATS.c.trial_id == TRIALS.c.trial_id)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.RUNNING)
    )
    with store.reading() as connection:
        now = connection.execute(sqlalchemy.select(sqlalchemy.func.now())).scalar_one()
        now = now.replace(tzinfo=None)
        return [
            trial_id
            for trial_id, last in connection.execute(query)
            if now - last.replace(tzinfo=None) > timedelta(seconds=lost_after_s)
        ]


def superseded(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of the trials that another one has replaced."""
    return {
        trial.user_attrs[attr.RETRY_OF] for trial in trials if attr.RETRY_OF in trial.user_attrs
    }


def current(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count: one for each of the budget."""
    replaced = superseded(trials)
    return [trial for trial in trials if trial.number not in replaced]


def reconcile(store: Store, study_id: int, spec: StudySpec) -> list[int]:
    """Put a new trial in the place of every one that is to be tried again; their numbers.

    Ending a trial and enqueueing its successor are two commits, and a crash may come between
    them. So nothing relies on the moment: whoever calls this next finds what is missing. Call it
    under :meth:`Store.exclusively`, which keeps two controllers from adding two successors.
    """
    with store.writing() as connection:
        found = tables.read(connection, due_ids(connection, study_id, spec).values())
        tables.insert(connection, study_id, [_successor(trial) for trial in found])
    return [trial.number for trial in found]


def tries(spec: StudySpec, outcome: Outcome | str | None) -> int:
    """How often a trial that ended so is tried again (design decision 9)."""
    match outcome:
        case Outcome.LOST:
            return spec.faults.retries
        case Outcome.OUT_OF_MEMORY:
            return int(spec.faults.on_out_of_memory == "retry")
        case Outcome.CRASHED:
            return spec.faults.crash_retries
    return 0


def due(spec: StudySpec, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Of all trials of a study: those to be tried again that have no successor yet."""
    return [
        trial
        for trial in current(trials)
        if trial.state is TrialState.FAIL
        and _failures(trial) < tries(spec, trial.user_attrs.get(attr.OUTCOME))
    ]


def any_due(store: Store, study_id: int, spec: StudySpec) -> bool:
    """Whether :func:`reconcile` would find anything to do."""
    with store.reading() as connection:
        return bool(due_ids(connection, study_id, spec))


def due_ids(connection: sqlalchemy.Connection, study_id: int, spec: StudySpec) -> dict[int, int]:
    """As :func:`due`, from the database: number → id. Reads failed trials only."""
    tried_again = {str(outcome): tries(spec, outcome) for outcome in Outcome}
    outcomes = [json.dumps(outcome) for outcome, times in tried_again.items() if times]
    before = sqlalchemy.alias(FACTS)
    query = (
        sqlalchemy.select(
            TRIALS.c.number, TRIALS.c.trial_id, FACTS.c.value_json, before.c.value_json
        )
        .join(FACTS, FACTS.c.trial_id == TRIALS.c.trial_id)
        .outerjoin(
            before,
            (before.c.trial_id == TRIALS.c.trial_id) & (before.c.key == attr.FAILURES),
        )
        .where(
            TRIALS.c.study_id == study_id,
            TRIALS.c.state == TrialState.FAIL,
            FACTS.c.key == attr.OUTCOME,
            FACTS.c.value_json.in_(outcomes),
        )
    )
    failed = connection.execute(query).all()
    gone = replaced(connection, study_id) if failed else set()
    return {
        number: trial_id
        for number, trial_id, outcome, failures in failed
        if number not in gone
        and json.loads(failures or "{}").get(json.loads(outcome), 0)
        < tried_again[json.loads(outcome)]
    }


def replaced(connection: sqlalchemy.Connection, study_id: int) -> set[int]:
    """As :func:`superseded`, from the database."""
    return set(tables.facts(connection, study_id, attr.RETRY_OF).values())


def _failures(trial: FrozenTrial) -> int:
    """How often attempts before this one ended in the same way."""
    return int(trial.user_attrs.get(attr.FAILURES, {}).get(trial.user_attrs.get(attr.OUTCOME), 0))


def _successor(trial: FrozenTrial) -> FrozenTrial:
    """The trial once more: to sampler and pruner it is the one before, as far as that got.

    A state of CMA-ES stays behind: the youngest trial's counts, and this one would be the youngest.
    """
    kept = (
        *(attr.TICKET, attr.FIXED, attr.SET, attr.DRAWN, attr.RUN_ID, attr.ALONE),
        attr.PRUNED_AFTER,
    )
    known = trial.user_attrs
    failed = {**known.get(attr.FAILURES, {}), known.get(attr.OUTCOME): _failures(trial) + 1}
    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={
            **{name: known[name] for name in kept if name in known},
            attr.ATTEMPT: known.get(attr.ATTEMPT, 1) + 1,
            attr.RETRY_OF: trial.number,
            attr.ORIGIN: known.get(attr.ORIGIN, trial.number),
            attr.FAILURES: failed,
        },
        system_attrs={
            key: value
            for key, value in trial.system_attrs.items()
            if not key.startswith(_OPTIMIZER)
        },
    )


def retry(store: Store, study_id: int) -> list[int]:
    """Put a new trial in the place of every failed one, whatever ended it; their numbers.

    What ``sweeper retry`` does. Call it under :meth:`Store.exclusively`.
    """
    query = sqlalchemy.select(TRIALS.c.trial_id).where(
        TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.FAIL
    )
    with store.writing() as connection:
        gone = replaced(connection, study_id)
        ids = connection.execute(query).scalars().all()
        failed = [trial for trial in tables.read(connection, ids) if trial.number not in gone]
        successors = [_successor(trial) for trial in failed]
        for successor in successors:
            successor.set_user_attr(attr.ATTEMPT, 1)
            successor.set_user_attr(attr.FAILURES, {})
        tables.insert(connection, study_id, successors)
    return [trial.number for trial in failed]

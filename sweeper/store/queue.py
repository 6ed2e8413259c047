"""The queue: Optuna's WAITING trials (design decision 1).

===================== ============================================= =============================
from → to             who                                           how
===================== ============================================= =============================
– → WAITING           controller, ``tickets.fill``                  under the store's lock
                      anybody, ``recovery.reconcile``               under the store's lock
WAITING → RUNNING     worker, :func:`claim`                         compare-and-set
RUNNING → WAITING     the worker that has it, ``held.put_back``     it stops at once
RUNNING → COMPLETE,   the worker that has it, ``held.finish``       refused once it was lost
PRUNED or FAIL
RUNNING → FAIL        anybody, ``recovery.reap``, after too long a  compare-and-set
                      silence; the trial's outcome is ``lost``
===================== ============================================= =============================

A worker never creates a trial, so the number of trials, without those that a retry replaced, is
the budget at every moment. A lost trial stays as it ended and a new one takes its place, so that
a worker that comes back from the dead finds its trial finished and cannot write over it.

Here trials are taken; what a worker does with the one it has is `sweeper.store.held`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from sweeper.store import attributes as attr
from sweeper.store import sampling, tables
from sweeper.store.attributes import Outcome
from sweeper.store.database import Store
from sweeper.store.refusals import reaching
from sweeper.store.tables import BEATS, FACTS, TRIALS
from sweeper.study.spec import StudySpec

_KNOWN_AHEAD: Final = 512
"""So many waiting trials are looked through for one that fits into a cohort."""
_FIRST_LOOK: Final = 16
"""So many of them at first: mostly one of the oldest fits, and the others need not be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A trial that this worker has, with what is known of it before it starts."""

    trial_id: int
    number: int
    origin: int
    attempt: int
    worker: str
    failed: Mapping[str, int] = field(default_factory=dict)
    alone: bool = False
    """It is to train by itself: it was in a cohort that crashed."""

    def failures(self, outcome: Outcome) -> int:
        """How often the attempts before this one ended so."""
        return self.failed.get(str(outcome), 0)


def claim(store: Store, study_id: int, worker: str) -> Claim | None:
    """Take a waiting trial, the oldest first, or None where none is waiting.

    One transaction: from its first moment as RUNNING the trial has a worker and a fresh beat. It
    reads no other trial, and workers that claim at once on PostgreSQL do not wait for each other.
    """
    if remote := store.remote:  # the controller claims for us
        with reaching(store.url):
            found = remote.call("claim", study_id=study_id, worker=worker)
        return None if found is None else Claim(**found)
    with store.writing() as connection:
        return _take(connection, TRIALS.c.study_id == study_id, worker)


def claim_where(
    store: Store,
    study_id: int,
    worker: str,
    *,
    spec: StudySpec,
    fits: Callable[[Mapping[str, Any]], bool],
) -> Claim | None:
    """Take the oldest waiting trial whose values are known before it runs and fit, or None.

    Such are grid points, published configurations and trials that were begun before. No sampler is
    asked: what it is to decide is :func:`claim`'s. Behind a proxy nothing is found.
    """
    if store.remote:
        return None
    for trial in _known_waiting(store, study_id):
        if fits(values(spec, trial)):
            with store.writing() as connection:
                taken = _take(connection, TRIALS.c.trial_id == trial._trial_id, worker)
            if taken is not None:
                return taken
    return None


def fits_any(
    store: Store, study_id: int, *, spec: StudySpec, fits: Callable[[Mapping[str, Any]], bool]
) -> bool:
    """Whether :func:`claim_where` would find a trial."""
    if store.remote:
        return False
    return any(fits(values(spec, trial)) for trial in _known_waiting(store, study_id))


def unfinished(store: Store, study_id: int) -> int | None:
    """How many trials run or wait; None behind a proxy, where nobody counts them for us."""
    if store.remote:
        return None
    open_states = TRIALS.c.state.in_((TrialState.RUNNING, TrialState.WAITING))
    query = sqlalchemy.select(sqlalchemy.func.count()).where(
        TRIALS.c.study_id == study_id, open_states
    )
    with store.reading() as connection:
        return int(connection.execute(query).scalar_one())


def _known_waiting(store: Store, study_id: int) -> Iterator[FrozenTrial]:
    """The oldest waiting trials whose values are known and that may join others.

    Read as far as they are asked for, and no connection is held meanwhile.
    """
    oldest = _waiting(TRIALS.c.study_id == study_id, _KNOWN_AHEAD)
    with store.reading() as connection:
        ids = connection.execute(oldest).scalars().all()
    for some in (ids[:_FIRST_LOOK], ids[_FIRST_LOOK:]):
        if not some:
            return
        with store.reading() as connection:
            found = tables.read(connection, some)
        for trial in found:
            known = trial.user_attrs
            if known.keys() & {attr.FIXED, attr.DRAWN} and attr.ALONE not in known:
                yield trial


def _waiting(among: sqlalchemy.ColumnElement[bool], limit: int) -> sqlalchemy.Select[Any]:
    return (
        sqlalchemy.select(TRIALS.c.trial_id, TRIALS.c.number)
        .where(among, TRIALS.c.state == TrialState.WAITING)
        .order_by(TRIALS.c.trial_id)
        .limit(limit)
    )


def _take(
    connection: sqlalchemy.Connection, among: sqlalchemy.ColumnElement[bool], worker: str
) -> Claim | None:
    """The oldest waiting trial among these, now this worker's, or None where none waits."""
    taken = connection.execute(_waiting(among, 1).with_for_update(skip_locked=True)).one_or_none()
    if taken is None:
        return None
    connection.execute(
        sqlalchemy.update(TRIALS)
        .where(TRIALS.c.trial_id == taken.trial_id)
        .values(state=TrialState.RUNNING, datetime_start=tables.utc(datetime.now()))
    )
    now = sqlalchemy.func.now()
    connection.execute(
        tables.upserting(connection)(BEATS)
        .values(trial_id=taken.trial_id, heartbeat=now)
        .on_conflict_do_update(index_elements=[BEATS.c.trial_id], set_={"heartbeat": now})
    )
    tables.put_facts(connection, taken.trial_id, {attr.WORKER: worker})
    facts = sqlalchemy.select(FACTS.c.key, FACTS.c.value_json)
    facts = facts.where(FACTS.c.trial_id == taken.trial_id)
    known = {key: json.loads(value) for key, value in connection.execute(facts)}
    return Claim(
        trial_id=taken.trial_id,
        number=taken.number,
        origin=known.get(attr.ORIGIN, taken.number),
        attempt=known.get(attr.ATTEMPT, 1),
        worker=worker,
        failed=known.get(attr.FAILURES, {}),
        alone=bool(known.get(attr.ALONE)),
    )


def values(spec: StudySpec, trial: FrozenTrial) -> dict[str, Any]:
    """The parameters of a trial as the study file writes them, in the order of the file.

    Of one that waits those that are known: what the sampler is to decide is not."""
    known = {
        **sampling.decoded(spec, trial.system_attrs.get(attr.GIVEN, {})),
        **sampling.decoded(spec, trial.params),
        **trial.user_attrs.get(attr.SET, {}),
    }
    order = [path for path in spec.parameters if path in known]
    return {path: known[path] for path in [*order, *sorted(set(known) - set(order))]}

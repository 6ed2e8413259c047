"""The queue: Optuna's WAITING trials (design decision 1).

===================== ============================================= =============================
from → to             who                                           how
===================== ============================================= =============================
– → WAITING           controller, ``tickets.fill``                  under the store's lock
                      anybody, ``recovery.reconcile``               under the store's lock
WAITING → RUNNING     worker, :func:`claim`                         compare-and-set
RUNNING → WAITING     the worker that has it, :func:`put_back`      it stops at once
RUNNING → COMPLETE,   the worker that has it, :func:`finish`        refused once it was lost
PRUNED or FAIL
RUNNING → FAIL        anybody, ``recovery.reap``, after too long a  compare-and-set
                      silence; the trial's outcome is ``lost``
===================== ============================================= =============================

A worker never creates a trial, so the number of trials, without those that a retry replaced, is
the budget at every moment. A lost trial stays as it ended and a new one takes its place, so that
a worker that comes back from the dead finds its trial finished and cannot write over it.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from sweeper.errors import TrialLostError
from sweeper.store import attributes as attr
from sweeper.store import sampling, tables
from sweeper.store.attributes import Outcome
from sweeper.store.cache import RecentStorage
from sweeper.store.database import Store
from sweeper.store.refusals import reaching
from sweeper.store.tables import BEATS, FACTS, TRIALS
from sweeper.study.spec import StudySpec

_KNOWN_AHEAD: Final = 512
"""So many waiting trials are looked through for one that fits into a cohort."""
_PRUNER_SLACK_S: Final = 1.0
_KEEP_RUNGS: Final = (optuna.pruners.SuccessiveHalvingPruner, optuna.pruners.HyperbandPruner)
"""Pruners that write what they decided into the trial and must read it back fresh."""
_ERROR_CHARACTERS: Final = 8000


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


def _known_waiting(store: Store, study_id: int) -> list[FrozenTrial]:
    """The oldest waiting trials whose values are known and that may join others."""
    with store.reading() as connection:
        ids = connection.execute(_waiting(TRIALS.c.study_id == study_id, _KNOWN_AHEAD)).scalars()
        return [
            trial
            for trial in tables.read(connection, ids)
            if trial.user_attrs.keys() & {attr.FIXED, attr.DRAWN}
            and attr.ALONE not in trial.user_attrs
        ]


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


def values_of(spec: StudySpec, study: optuna.Study, claimed: Claim) -> dict[str, Any]:
    """The trial's parameters by dotted path: fixed ones as they are, the others drawn now."""
    with reaching("the database"), _owned():
        storage = study._storage
        frozen = storage.get_trial(claimed.trial_id)
        if frozen.user_attrs.get(attr.FIXED) or frozen.user_attrs.get(attr.DRAWN):
            return values(spec, frozen)
        if isinstance(storage, RecentStorage):
            storage.know(study._study_id, frozen)
        study.sampler = sampling.sampler(spec, claimed.origin)
        drawn = sampling.draw(spec, optuna.Trial(study, claimed.trial_id))
        study._storage.set_trial_user_attr(claimed.trial_id, attr.DRAWN, True)
        return drawn


def values(spec: StudySpec, trial: FrozenTrial) -> dict[str, Any]:
    """The parameters of a trial as the study file writes them, in the order of the file."""
    known = {
        **sampling.decoded(spec, trial.params),
        **trial.user_attrs.get(attr.SET, {}),
    }
    order = [path for path in spec.parameters if path in known]
    return {path: known[path] for path in [*order, *sorted(set(known) - set(order))]}


def put_back(store: Store, claimed: Claim) -> None:
    """Give a trial back unfinished: the next worker that is free takes it.

    May be called again where nobody knows whether the call before arrived. Raises TrialLostError
    where the trial was taken away meanwhile.
    """
    with reaching(store.url), _owned():
        if not _is_mine(store.storage.get_trial(claimed.trial_id), claimed):
            raise TrialLostError
        store.storage.set_trial_user_attr(claimed.trial_id, attr.ATTEMPT, claimed.attempt + 1)
        store.storage.set_trial_state_values(claimed.trial_id, TrialState.WAITING)


def report(store: Store, claimed: Claim, epoch: int, value: float) -> None:
    """Store the first objective's value after ``epoch``.

    Raises TrialLostError where the store has given the trial to another worker.
    """
    with reaching(store.url), _owned():
        store.storage.set_trial_intermediate_value(claimed.trial_id, epoch, value)


def report_missing(store: Store, claimed: Claim, series: Mapping[int, float]) -> None:
    """Store the values of earlier epochs (epoch → value) that the trial does not have yet."""
    with reaching(store.url), _owned():
        known = store.storage.get_trial(claimed.trial_id).intermediate_values
        for epoch in sorted(series.keys() - known.keys()):
            store.storage.set_trial_intermediate_value(claimed.trial_id, epoch, series[epoch])


def prunes(study: optuna.Study) -> bool:
    """Whether the study has a pruner that may end a trial."""
    return not isinstance(study.pruner, optuna.pruners.NopPruner)


def should_prune(
    store: Store, study: optuna.Study, claimed: Claim, epoch: int, told: Mapping[int, float]
) -> bool:
    """Whether the study's pruner would end the trial after ``epoch``.

    It compares with the other trials as they were up to a second ago; ``told`` are the trial's own
    values (epoch → value) that may be newer than that. What an earlier attempt reported of later
    epochs does not count.
    """
    if not prunes(study) or len(study.directions) > 1:  # Optuna prunes by one objective only
        return False
    with reaching(store.url), store.storage.recent(_PRUNER_SLACK_S):
        if isinstance(study.pruner, _KEEP_RUNGS):
            known = store.storage.get_trial(claimed.trial_id)
        else:
            known = study.get_trials(deepcopy=False)[claimed.number]
        frozen = copy.copy(known)
        frozen.intermediate_values = {
            step: value
            for step, value in {**known.intermediate_values, **told}.items()
            if step <= epoch
        }
        return bool(study.pruner.prune(study, frozen))


def note(store: Store, claimed: Claim, facts: Mapping[str, Any]) -> None:
    """Store facts about a running trial under their attribute names."""
    with reaching(store.url), _owned():
        _write(store, claimed, facts)


def _write(store: Store, claimed: Claim, facts: Mapping[str, Any]) -> None:
    if store.remote:
        for name, fact in facts.items():
            store.storage.set_trial_user_attr(claimed.trial_id, name, fact)
        return
    with store.writing() as connection:
        tables.write_facts(connection, claimed.trial_id, facts)


def finish(
    store: Store,
    study: optuna.Study,
    claimed: Claim,
    *,
    outcome: Outcome,
    ends_as: State | None = None,
    values: Sequence[float] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """End a trial: its facts first, its state last, so that a finished trial is a whole one.

    ``values`` are the objectives of a completed trial. ``ends_as`` is the state of a trial that
    neither completed nor was pruned: ``failed`` unless something else is said. May be called again
    where nobody knows whether the call before arrived.

    Raises TrialLostError where the store has given it to another worker.
    """
    ends_as = ends_as or _ENDS_AS.get(outcome, "failed")
    with reaching(store.url), _owned():
        frozen = store.storage.get_trial(claimed.trial_id)
        if frozen.state is _STATES[ends_as] and _ended_so(frozen, claimed, outcome):
            return
        if not _is_mine(frozen, claimed):
            raise TrialLostError
        all_facts = {**(facts or {}), attr.OUTCOME: str(outcome)}
        _write(
            store,
            claimed,
            {
                name: fact[-_ERROR_CHARACTERS:] if isinstance(fact, str) else fact
                for name, fact in all_facts.items()
            },
        )
        told = list(values) if ends_as == "complete" else None
        study.tell(frozen.number, told, state=_STATES[ends_as])


def _is_mine(frozen: FrozenTrial, claimed: Claim) -> bool:
    owner = frozen.user_attrs.get(attr.WORKER, claimed.worker)
    return frozen.state is TrialState.RUNNING and owner == claimed.worker


def _ended_so(frozen: FrozenTrial, claimed: Claim, outcome: Outcome) -> bool:
    known = frozen.user_attrs
    return known.get(attr.OUTCOME) == str(outcome) and known.get(attr.WORKER) == claimed.worker


State = Literal["complete", "pruned", "failed"]
_STATES: Final[Mapping[State, TrialState]] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_ENDS_AS: Final[Mapping[Outcome, State]] = {
    Outcome.COMPLETED: "complete",
    Outcome.PRUNED: "pruned",
}


def remember_run(store: Store, study_name: str, origin: int, run_id: str) -> None:
    """Store the MLflow run of the running trial that began as number ``origin``.

    A trial that has ended meanwhile keeps none; its run is found by its tag instead.
    """
    with reaching(store.url):
        study_id = store.storage.get_study_id_from_name(study_name)
        for trial_id, began_as in _running(store, study_id):
            if began_as == origin:
                with contextlib.suppress(UpdateFinishedTrialError):
                    store.storage.set_trial_user_attr(trial_id, attr.RUN_ID, run_id)


def _running(store: Store, study_id: int) -> list[tuple[int, int]]:
    """Id and origin of every running trial."""
    if store.remote:
        trials = store.storage.get_all_trials(study_id, deepcopy=False, states=[TrialState.RUNNING])
        return [(t._trial_id, t.user_attrs.get(attr.ORIGIN, t.number)) for t in trials]
    query = (
        sqlalchemy.select(TRIALS.c.trial_id, TRIALS.c.number, FACTS.c.value_json)
        .outerjoin(FACTS, (FACTS.c.trial_id == TRIALS.c.trial_id) & (FACTS.c.key == attr.ORIGIN))
        .where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.RUNNING)
    )
    with store.reading() as connection:
        return [
            (trial_id, number if origin is None else json.loads(origin))
            for trial_id, number, origin in connection.execute(query)
        ]


class _owned:  # noqa: N801 - reads as what it is, a context
    """Optuna refuses to touch a finished trial: to its worker that means that it was lost."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, UpdateFinishedTrialError):
            raise TrialLostError from error


def beat(store: Store, claimed: Claim) -> None:
    """Say that the trial's worker is alive."""
    with reaching(store.url):
        store.storage.record_heartbeat(claimed.trial_id)

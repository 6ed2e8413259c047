"""The queue: Optuna's WAITING trials (design decision 1).

===================== ============================================= =============================
from → to             who                                           how
===================== ============================================= =============================
– → WAITING           controller, :func:`fill` and :func:`reconcile` under the store's lock
WAITING → RUNNING     worker, :func:`claim`                         compare-and-set
RUNNING → WAITING     the worker that has it, :func:`put_back`      it stops at once
RUNNING → COMPLETE,   the worker that has it, :func:`finish`        refused once it was lost
PRUNED or FAIL
RUNNING → FAIL        anybody, :func:`reap`, after too long a       compare-and-set
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
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ValidationError

from sweeper.config import TrialConfig
from sweeper.errors import StoreUnreachableError, TrialLostError
from sweeper.space import contains, grid
from sweeper.store import attributes as attr
from sweeper.store import sampling
from sweeper.store.attributes import Outcome
from sweeper.store.database import Store, reaching
from sweeper.study.spec import Faults, Grid, ReferenceOnly, StudySpec

_AHEAD: Final = 16
_PRUNER_SLACK_S: Final = 1.0
_KEEP_RUNGS: Final = (optuna.pruners.SuccessiveHalvingPruner, optuna.pruners.HyperbandPruner)
"""Pruners that write what they decided into the trial and must read it back fresh."""
_ERROR_CHARACTERS: Final = 8000


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A trial that the study is to have.

    ``values`` None: the sampler decides; otherwise exactly these. ``key`` says which trial of the
    plan it is; only tickets of the sampler share one.
    """

    key: str
    values: Mapping[str, Any] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A trial that this worker has, with what is known of it before it starts."""

    trial_id: int
    number: int
    origin: int
    attempt: int
    worker: str
    failed: Mapping[str, int] = field(default_factory=dict)

    def failures(self, outcome: Outcome) -> int:
        """How often the attempts before this one ended so."""
        return self.failed.get(str(outcome), 0)


def tickets(spec: StudySpec, *, with_reference: bool) -> list[Ticket]:
    """Every trial of a study in the order in which they are to run.

    Published configurations come first. A grid point that was published is not run twice.
    """
    published = (
        list(spec.reference.trials)
        if spec.reference and (with_reference or isinstance(spec.search.sampler, ReferenceOnly))
        else []
    )
    result = [
        Ticket(key=f"reference/{index}", values=trial.params, attributes={attr.REFERENCE: index})
        for index, trial in enumerate(published)
    ]
    match spec.search.sampler:
        case ReferenceOnly():
            return result
        case Grid():
            points = [
                Ticket(key="grid/" + json.dumps(point, sort_keys=True), values=point)
                for point in grid(spec.parameters)
            ]
            taken = [_config(spec, trial.params) for trial in published]
            return result + [
                ticket
                for ticket in points
                if not taken or _config(spec, ticket.values or {}) not in taken
            ]
    free = Ticket(key="sampler", values=None if spec.parameters else {})
    return result + [free] * (spec.search.trials or 1)


def _config(spec: StudySpec, values: Mapping[str, Any]) -> TrialConfig | None:
    """The configuration of a point, or None for one that no trial can have."""
    try:
        return spec.trial_config(values)
    except ValidationError:
        return None


def fill(store: Store, study_id: int, spec: StudySpec, planned: Sequence[Ticket]) -> int:
    """Enqueue those of ``planned`` that the study does not have yet; the number enqueued.

    Call it under :meth:`Store.exclusively`.
    """
    enqueued = 0
    with reaching(store.url):
        trials = current(store.storage.get_all_trials(study_id, deepcopy=False))
        have = Counter(trial.user_attrs.get(attr.TICKET) for trial in trials)
        for ticket in planned:
            if have[ticket.key] > 0:
                have[ticket.key] -= 1
                continue
            store.storage.create_new_trial(study_id, _waiting(spec, ticket))
            enqueued += 1
    return enqueued


def _waiting(spec: StudySpec, ticket: Ticket) -> FrozenTrial:
    """Values that the sampler could have drawn become the trial's parameters, the rest ``SET``."""
    attributes: dict[str, Any] = {
        attr.TICKET: ticket.key,
        attr.ATTEMPT: 1,
        **ticket.attributes,
    }
    if ticket.values is None:
        return create_trial(state=TrialState.WAITING, user_attrs=attributes)
    inside = {
        path: value
        for path, value in ticket.values.items()
        if path in spec.parameters
        and spec.parameters[path].holds(ticket.values)
        and contains(spec.parameters[path], value)
    }
    outside = {path: value for path, value in ticket.values.items() if path not in inside}
    attributes |= {attr.FIXED: True}
    if outside:
        attributes[attr.SET] = outside
    return create_trial(
        state=TrialState.WAITING,
        params=sampling.encoded(spec, inside),
        distributions={path: sampling.distribution(spec.parameters[path]) for path in inside},
        user_attrs=attributes,
    )


def claim(store: Store, study_id: int, worker: str) -> Claim | None:
    """Take a waiting trial, the oldest first, or None where none is waiting.

    The heart beats before the claim: from its first moment as RUNNING the trial has a fresh beat.
    """
    with reaching(store.url):
        while waiting := _waiting_ids(store, study_id):
            # the first few in an order of one's own: many workers need not race for the same one
            for trial_id in waiting[:1] + random.sample(waiting[1:], len(waiting) - 1):
                store.backend.record_heartbeat(trial_id)
                try:
                    taken = store.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
                except UpdateFinishedTrialError:
                    continue
                if taken:
                    store.storage.set_trial_user_attr(trial_id, attr.WORKER, worker)
                    trial = store.storage.get_trial(trial_id)
                    known = trial.user_attrs
                    return Claim(
                        trial_id=trial_id,
                        number=trial.number,
                        origin=known.get(attr.ORIGIN, trial.number),
                        attempt=known.get(attr.ATTEMPT, 1),
                        worker=worker,
                        failed=known.get(attr.FAILURES, {}),
                    )
    return None


def _waiting_ids(store: Store, study_id: int) -> list[int]:
    trial = models.TrialModel
    query = (
        sqlalchemy.select(trial.trial_id)
        .where(trial.study_id == study_id, trial.state == TrialState.WAITING)
        .order_by(trial.trial_id)
        .limit(_AHEAD)
    )
    with store.backend.engine.connect() as connection:
        return list(connection.execute(query).scalars())


def values_of(spec: StudySpec, study: optuna.Study, claimed: Claim) -> dict[str, Any]:
    """The trial's parameters by dotted path: fixed ones as they are, the others drawn now."""
    with reaching("the database"), _owned():
        study.get_trials(deepcopy=False)  # Optuna's cache must know the trial before it is drawn
        frozen = study._storage.get_trial(claimed.trial_id)
        if frozen.user_attrs.get(attr.FIXED) or frozen.user_attrs.get(attr.DRAWN):
            return values(spec, frozen)
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


def should_prune(
    store: Store, study: optuna.Study, claimed: Claim, epoch: int, told: Mapping[int, float]
) -> bool:
    """Whether the study's pruner would end the trial after ``epoch``.

    It compares with the other trials as they were up to a second ago; ``told`` are the trial's own
    values (epoch → value) that may be newer than that. What an earlier attempt reported of later
    epochs does not count.
    """
    if isinstance(study.pruner, optuna.pruners.NopPruner) or len(study.directions) > 1:
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
        for name, value in facts.items():
            store.storage.set_trial_user_attr(claimed.trial_id, name, value)


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
        frozen = store.backend.get_trial(claimed.trial_id)
        if frozen.state is _STATES[ends_as] and _ended_so(frozen, claimed, outcome):
            return
        if not _is_mine(frozen, claimed):
            raise TrialLostError
        for name, value in {**(facts or {}), attr.OUTCOME: str(outcome)}.items():
            if isinstance(value, str):
                value = value[-_ERROR_CHARACTERS:]
            store.storage.set_trial_user_attr(claimed.trial_id, name, value)
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
        for trial in store.storage.get_all_trials(
            study_id, deepcopy=False, states=(TrialState.RUNNING,)
        ):
            if trial.user_attrs.get(attr.ORIGIN, trial.number) == origin:
                with contextlib.suppress(UpdateFinishedTrialError):
                    store.storage.set_trial_user_attr(trial._trial_id, attr.RUN_ID, run_id)


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
        store.backend.record_heartbeat(claimed.trial_id)


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
        if began - self._last > self._lost_after_s / 2:
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
        running = store.storage.get_all_trials(
            study_id, deepcopy=False, states=(TrialState.RUNNING,)
        )
        return [
            trial.number
            for trial in running
            if trial.user_attrs.get(attr.WORKER) == worker and _lose(store, trial._trial_id)
        ]


def return_trials_of(store: Store, study_id: int, worker: str) -> list[int]:
    """Put the running trials of a worker that was ended on purpose back; their numbers."""
    returned = []
    with reaching(store.url):
        for trial in store.storage.get_all_trials(
            study_id, deepcopy=False, states=(TrialState.RUNNING,)
        ):
            if trial.user_attrs.get(attr.WORKER) == worker:
                with contextlib.suppress(UpdateFinishedTrialError):
                    store.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                    returned.append(trial.number)
    return returned


def _lose(store: Store, trial_id: int) -> bool:
    try:
        store.storage.set_trial_user_attr(trial_id, attr.OUTCOME, str(Outcome.LOST))
        return store.storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def _silent_ids(store: Store, study_id: int, lost_after_s: float) -> list[int]:
    """Running trials without a beat for ``lost_after_s``, by the database's own clock."""
    trial, beats = models.TrialModel, models.TrialHeartbeatModel
    query = (
        sqlalchemy.select(trial.trial_id, beats.heartbeat)
        .join(beats, beats.trial_id == trial.trial_id)
        .where(trial.study_id == study_id, trial.state == TrialState.RUNNING)
    )
    with store.backend.engine.connect() as connection:
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
    with reaching(store.url):
        found = due(spec, store.storage.get_all_trials(study_id, deepcopy=False))
        for trial in found:
            store.storage.create_new_trial(study_id, _successor(trial))
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
    """The trials that ended and are to be tried again, and have no successor yet."""
    return [
        trial
        for trial in current(trials)
        if trial.state is TrialState.FAIL
        and _failures(trial) < tries(spec, trial.user_attrs.get(attr.OUTCOME))
    ]


def _failures(trial: FrozenTrial) -> int:
    """How often attempts before this one ended in the same way."""
    return int(trial.user_attrs.get(attr.FAILURES, {}).get(trial.user_attrs.get(attr.OUTCOME), 0))


def _successor(trial: FrozenTrial) -> FrozenTrial:
    kept = (attr.TICKET, attr.FIXED, attr.SET, attr.REFERENCE, attr.DRAWN, attr.RUN_ID)
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
    )


def retry(store: Store, study_id: int) -> list[int]:
    """Put a new trial in the place of every failed one, whatever ended it; their numbers.

    What ``sweeper retry`` does. Call it under :meth:`Store.exclusively`.
    """
    with reaching(store.url):
        trials = store.storage.get_all_trials(study_id, deepcopy=False)
        failed = [trial for trial in current(trials) if trial.state is TrialState.FAIL]
        for trial in failed:
            successor = _successor(trial)
            successor.set_user_attr(attr.ATTEMPT, 1)
            successor.set_user_attr(attr.FAILURES, {})
            store.storage.create_new_trial(study_id, successor)
    return [trial.number for trial in failed]

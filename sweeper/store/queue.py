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
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from sweeper.errors import TrialLostError
from sweeper.store import attributes as attr
from sweeper.store import sampling
from sweeper.store.attributes import Outcome
from sweeper.store.database import Store, reaching
from sweeper.study.spec import StudySpec

_AHEAD: Final = 16
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

    The heart beats before the claim: from its first moment as RUNNING the trial has a fresh beat.
    """
    if remote := store.remote:  # one call instead of five: the controller claims for us
        with reaching(store.url):
            found = remote.call("claim", study_id=study_id, worker=worker)
        return None if found is None else Claim(**found)
    with reaching(store.url):
        while waiting := _waiting_ids(store, study_id):
            # the first few in an order of one's own: many workers need not race for the same one
            for trial_id in waiting[:1] + random.sample(waiting[1:], len(waiting) - 1):
                if (taken := _taken(store, trial_id, worker)) is not None:
                    return taken
    return None


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
    with reaching(store.url):
        for trial_id, known in _known_waiting(store, study_id, spec).items():
            if fits(known) and (taken := _taken(store, trial_id, worker)) is not None:
                return taken
    return None


def _taken(store: Store, trial_id: int, worker: str) -> Claim | None:
    """The trial, now this worker's, or None where another one was faster."""
    store.backend.record_heartbeat(trial_id)
    try:
        if not store.storage.set_trial_state_values(trial_id, TrialState.RUNNING):
            return None
    except UpdateFinishedTrialError:
        return None
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
        alone=bool(known.get(attr.ALONE)),
    )


def _known_waiting(store: Store, study_id: int, spec: StudySpec) -> dict[int, dict[str, Any]]:
    """The values of the oldest waiting trials whose values are known, by trial id.

    Read in three queries, whatever their number; those that are to train alone are left out.
    """
    ids = _waiting_ids(store, study_id, limit=_KNOWN_AHEAD)
    said, given = models.TrialUserAttributeModel, models.TrialParamModel
    about: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in ids}
    params: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in ids}
    with store.backend.engine.connect() as connection:
        for trial_id, key, text in connection.execute(
            sqlalchemy.select(said.trial_id, said.key, said.value_json).where(
                said.trial_id.in_(ids),
                said.key.in_((attr.FIXED, attr.DRAWN, attr.SET, attr.ALONE)),
            )
        ):
            about[trial_id][key] = json.loads(text)
        for trial_id, path, value, text in connection.execute(
            sqlalchemy.select(
                given.trial_id, given.param_name, given.param_value, given.distribution_json
            ).where(given.trial_id.in_(ids))
        ):
            distribution = optuna.distributions.json_to_distribution(text)
            params[trial_id][path] = distribution.to_external_repr(value)
    return {
        trial_id: {
            **sampling.decoded(spec, params[trial_id]),
            **about[trial_id].get(attr.SET, {}),
        }
        for trial_id in ids
        if about[trial_id].keys() & {attr.FIXED, attr.DRAWN} and attr.ALONE not in about[trial_id]
    }


def _waiting_ids(store: Store, study_id: int, limit: int = _AHEAD) -> list[int]:
    trial = models.TrialModel
    query = (
        sqlalchemy.select(trial.trial_id)
        .where(trial.study_id == study_id, trial.state == TrialState.WAITING)
        .order_by(trial.trial_id)
        .limit(limit)
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
        frozen = store.storage.get_trial(claimed.trial_id)
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
        store.storage.record_heartbeat(claimed.trial_id)

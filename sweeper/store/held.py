"""What a worker does with the trial that it has claimed: draw, report, decide, end, give back.

What would change a trial that the store has given to another worker raises TrialLostError.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final, Literal, cast

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from sweeper.errors import TrialLostError
from sweeper.settings import Owner
from sweeper.store import attributes as attr
from sweeper.store import recovery, sampling, tables
from sweeper.store.attributes import Outcome
from sweeper.store.cache import RecentStorage
from sweeper.store.database import Store
from sweeper.store.queue import Claim, values
from sweeper.store.refusals import reaching
from sweeper.store.studies import StoredStudy
from sweeper.store.tables import FACTS, TRIALS
from sweeper.study.spec import StudySpec

_PRUNER_SLACK_S: Final = 1.0
_KEEP_RUNGS: Final = (optuna.pruners.SuccessiveHalvingPruner, optuna.pruners.HyperbandPruner)
"""Pruners that write what they decided into the trial and must read it back fresh."""
_ERROR_CHARACTERS: Final = 8000
_SENT_AT_ONCE: Final = 10_000
"""So many values go to a proxy in one message, which must not be longer than 4 MiB."""


def values_of(spec: StudySpec, study: optuna.Study, claimed: Claim) -> dict[str, Any]:
    """The trial's parameters by dotted path: fixed ones as they are, the others drawn now."""
    storage = study._storage
    with reaching("the database"), _owned():
        frozen = storage.get_trial(claimed.trial_id)
    with reaching("the database"), _unfinished():
        if frozen.user_attrs.get(attr.FIXED) or frozen.user_attrs.get(attr.DRAWN):
            return values(spec, frozen)
        if isinstance(storage, RecentStorage):
            storage.know(study._study_id, frozen)
        study.sampler = sampling.sampler(spec, claimed.origin)
        drawn = sampling.draw(spec, optuna.Trial(study, claimed.trial_id))
        study._storage.set_trial_user_attr(claimed.trial_id, attr.DRAWN, True)
        return drawn


def owner_of(study: StoredStudy, claimed: Claim) -> Owner:
    """Whose the trial's run is; of a trial that was begun before, with the run that it had."""
    with reaching("the database"):
        owner = study.owner
        if claimed.attempt > 1:
            facts = study.study._storage.get_trial(claimed.trial_id).user_attrs
            owner = replace(owner, run_ids=frozenset(filter(None, [facts.get(attr.RUN_ID)])))
    return owner


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
    if report_all(store, {claimed.trial_id: {epoch: value}}):
        raise TrialLostError


def report_all(store: Store, reports: Mapping[int, Mapping[int, float]]) -> set[int]:
    """Store the first objective's values of many trials (id → epoch → value), in one transaction,
    or very many behind a proxy in several.

    The ids of those that the store has given to another worker: they get nothing. What is there
    already is written again.
    """
    remote = store.remote
    if remote is None:
        with store.writing() as connection:
            return tables.write_reports(connection, reports)
    rows = iter(
        [
            (trial_id, epoch, float(value))
            for trial_id, series in reports.items()
            for epoch, value in series.items()
        ]
    )
    lost: set[int] = set()
    with reaching(store.url):
        while some := list(islice(rows, _SENT_AT_ONCE)):
            lost.update(remote.call("report", rows=some))
    return lost


def report_missing(store: Store, claimed: Claim, series: Mapping[int, float]) -> None:
    """Store the values of earlier epochs (epoch → value) that the trial does not have yet."""
    with reaching(store.url), _owned():
        known = store.storage.get_trial(claimed.trial_id).intermediate_values
    missing = {epoch: series[epoch] for epoch in sorted(series.keys() - known.keys())}
    if report_all(store, {claimed.trial_id: missing}):
        raise TrialLostError


def prunes(study: optuna.Study) -> bool:
    """Whether the study has a pruner that may end a trial."""
    return not isinstance(study.pruner, optuna.pruners.NopPruner)


def should_prune(
    store: Store, study: optuna.Study, claimed: Claim, epoch: int, told: Mapping[int, float]
) -> bool:
    """Whether the study's pruner would end the trial after ``epoch``.

    It compares with the other trials as they were up to a second ago, or as they are where it reads
    what it wrote into them; ``told`` are the trial's own values (epoch → value) that may be newer
    than that. What an earlier attempt reported of later epochs does not count, and no trial
    competes with one that it replaced.
    """
    if not prunes(study) or len(study.directions) > 1:  # Optuna prunes by one objective only
        return False
    keeps_rungs = isinstance(study.pruner, _KEEP_RUNGS)
    slack_s = 0.0 if keeps_rungs else _PRUNER_SLACK_S  # a cohort reaches its rungs at one moment
    with reaching(store.url), _unfinished(), store.storage.recent(slack_s):
        known, rungs = None, {}
        if keeps_rungs:
            study = copy.copy(study)
            begun = _AsBegun(study._storage)
            study._storage, rungs = cast("Any", begun), begun.rungs
        else:
            trials = study.get_trials(deepcopy=False)
            known = trials[claimed.number] if claimed.number < len(trials) else None
        if known is None:  # its rungs are to be fresh, or it is younger than what was read
            with _owned():
                known = _as_begun(store.storage.get_trial(claimed.trial_id))
        if known.user_attrs.get(attr.PRUNED_AFTER, epoch + 1) <= epoch:
            return True  # decided before, but whoever asked did not live to end the trial
        frozen = copy.copy(known)
        frozen.intermediate_values = {
            step: value
            for step, value in {**known.intermediate_values, **told}.items()
            if step <= epoch
        }
        pruned = bool(study.pruner.prune(study, frozen))
        if keeps_rungs and (rungs or pruned):
            # All or nothing: once its rungs are there, the trial passed them if nothing else is.
            facts = {attr.PRUNED_AFTER: epoch} if pruned else {}
            with _owned():
                store.storage.set_rungs(claimed.trial_id, rungs, facts)
        return pruned


class _AsBegun:
    """A storage in which a trial and those that it replaced are one, with the number of the first:
    that of its Hyperband bracket. What a pruner writes into its trial is kept in ``rungs``."""

    def __init__(self, storage: optuna.storages.BaseStorage) -> None:
        self._storage = storage
        self.rungs: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = self._storage.get_all_trials(study_id, deepcopy=deepcopy)
        found = map(_as_begun, recovery.current(trials))
        return [trial for trial in found if states is None or trial.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: float) -> None:
        self.rungs[key] = value


def _as_begun(trial: FrozenTrial) -> FrozenTrial:
    origin = trial.user_attrs.get(attr.ORIGIN, trial.number)
    if origin == trial.number:
        return trial
    begun = copy.copy(trial)
    begun.number = origin
    return begun


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


@contextlib.contextmanager
def _unfinished() -> Iterator[None]:
    """Optuna refuses to touch a finished trial: to its worker that means that it was lost."""
    try:
        yield
    except UpdateFinishedTrialError as error:
        raise TrialLostError from error


@contextlib.contextmanager
def _owned() -> Iterator[None]:
    """As :func:`_unfinished`, also where the trial was deleted with its study."""
    try:
        with _unfinished():
            yield
    except KeyError as error:
        raise TrialLostError from error


def beat(store: Store, claims: Iterable[Claim]) -> None:
    """Say that the worker of these trials is alive, in one transaction.

    Of a trial that was deleted nothing is said, and nothing goes wrong.
    """
    ids = [claimed.trial_id for claimed in claims]
    remote = store.remote
    if remote is None:
        with store.writing() as connection:
            tables.write_beats(connection, ids)
        return
    with reaching(store.url):
        remote.call("beat", trial_ids=ids)

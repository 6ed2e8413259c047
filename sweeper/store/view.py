"""What a study looks like from outside, one row a trial. `sweeper.store.glance` only counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeper.settings import ANYBODY, Owner
from sweeper.store import attributes as attr
from sweeper.store.database import Store
from sweeper.store.queue import values
from sweeper.store.recovery import due, superseded
from sweeper.store.refusals import reaching
from sweeper.store.studies import StoredStudy
from sweeper.study.spec import Objective, StudySpec

STATES = ("complete", "pruned", "failed", "running", "waiting")
"""The states of the trials that count, in the order in which they are shown."""

STATE = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow:
    """One trial.

    ``state`` is one of :data:`STATES`, or ``retried`` for a trial that another one replaced; one
    that ended and is about to be tried again is ``waiting``.
    ``values`` are the objectives of a finished trial, ``epoch`` and ``last_value`` what a running
    one reported last. ``seconds`` of wall time count from the claim. ``given`` are the paths whose
    values a person chose, not the sampler (``sweeper enqueue``).
    """

    number: int
    state: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    values: tuple[float, ...]
    epoch: int | None
    last_value: float | None
    history: Mapping[int, float]
    seconds: float | None
    started: datetime | None
    ended: datetime | None
    attempt: int
    origin: int
    run_id: str | None
    worker: str | None
    outcome: str | None
    error: str | None
    model_parameters: int | None
    given: tuple[str, ...] = ()

    def public(self) -> dict[str, Any]:
        """The row as ``trials --json`` prints it."""
        return {
            "number": self.number,
            "state": self.state,
            "params": dict(self.params),
            "given": list(self.given),
            "metrics": dict(self.metrics),
            "seconds": self.seconds,
            "attempt": self.attempt,
            "run_id": self.run_id,
            "worker": self.worker,
            "outcome": self.outcome,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A study at one moment: every trial, whatever its state, by number."""

    spec: StudySpec
    rows: tuple[TrialRow, ...]
    owner: Owner = ANYBODY

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state, each state present; ``retried`` ones do not count to the budget."""
        result = dict.fromkeys((*STATES, "retried"), 0)
        for row in self.rows:
            result[row.state] += 1
        return result

    @property
    def outcomes(self) -> dict[str, int]:
        """What ended attempts, retried ones included, by name; the most frequent first."""
        return dict(Counter(row.outcome for row in self.rows if row.outcome).most_common())

    @property
    def budget(self) -> int:
        """The trials that the study is to end, ended ones included."""
        return sum(row.state != "retried" for row in self.rows)

    @property
    def ended(self) -> int:
        return sum(row.state in {"complete", "pruned", "failed"} for row in self.rows)

    @property
    def over(self) -> bool:
        """Whether nothing is running or waiting."""
        return self.ended == self.budget

    @property
    def due(self) -> list[TrialRow]:
        """Trials that ended, are to be tried again, and have no successor yet."""
        return [row for row in self.rows if row.state == "waiting" and row.ended is not None]

    @property
    def best(self) -> TrialRow | None:
        """The completed trial with the best first objective; the earlier of equals."""
        return next(iter(self.leaderboard), None)

    @property
    def leaderboard(self) -> list[TrialRow]:
        """Completed trials, the best first objective first."""
        sign = -1 if self.spec.objective[0].maximize else 1
        complete = (row for row in self.rows if row.state == "complete" and row.values)
        return sorted(complete, key=lambda row: (sign * row.values[0], row.number))


def standing(store: Store, study: StoredStudy) -> Standing:
    """Read the study. Finished trials come from the cache after the first time."""
    with reaching(store.url):
        trials = store.storage.get_all_trials(study.id, deepcopy=False)
        owner = study.owner
    found = rows(study.spec, trials)
    run_ids = frozenset(row.run_id for row in found if row.run_id)
    return Standing(spec=study.spec, rows=found, owner=replace(owner, run_ids=run_ids))


def rows(spec: StudySpec, trials: Sequence[FrozenTrial]) -> tuple[TrialRow, ...]:
    """One row a trial."""
    states = {trial.number: STATE[trial.state] for trial in trials}
    states |= dict.fromkeys(superseded(trials), "retried")
    states |= {trial.number: "waiting" for trial in due(spec, trials)}
    return tuple(row_of(spec, trial, states[trial.number]) for trial in trials)


def row_of(spec: StudySpec, trial: FrozenTrial, state: str) -> TrialRow:
    """The row of one trial, which stands as ``state`` in its study."""
    known = trial.user_attrs
    began, over = trial.datetime_start, trial.datetime_complete
    seconds = known.get(attr.SECONDS)
    if seconds is None and began and over:
        seconds = (over - began).total_seconds()
    return TrialRow(
        number=trial.number,
        state=state,
        params=values(spec, trial),
        metrics=known.get(attr.METRICS, {}),
        values=tuple(trial.values or ()),
        epoch=trial.last_step,
        last_value=trial.intermediate_values[trial.last_step] if trial.last_step else None,
        history=trial.intermediate_values,
        seconds=None if seconds is None else round(seconds, 3),
        started=began,
        ended=over,
        attempt=known.get(attr.ATTEMPT, 1),
        origin=known.get(attr.ORIGIN, trial.number),
        run_id=known.get(attr.RUN_ID),
        worker=known.get(attr.WORKER),
        outcome=known.get(attr.OUTCOME),
        error=known.get(attr.ERROR),
        model_parameters=known.get(attr.PARAMETERS),
        given=tuple(trial.system_attrs.get(attr.GIVEN, ())),
    )


def better(objective: Objective, left: float, right: float) -> bool:
    """Whether ``left`` is the better value; anything is better than NaN."""
    if math.isnan(right):
        return not math.isnan(left)
    return left > right if objective.maximize else left < right


def best_of(objective: Objective, candidates: Iterable[float]) -> float:
    """The best of ``candidates``; NaN where there is none."""
    found = math.nan
    for value in candidates:
        if better(objective, value, found):
            found = value
    return found

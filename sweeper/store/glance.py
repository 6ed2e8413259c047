"""How a study stands, in figures: a few queries, whether it has ten trials or ten thousand.

`sweeper.store.view` has every trial as a row instead, for reports and lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy
from optuna.storages._rdb import models
from optuna.trial import TrialState

from sweeper.store import attributes as attr
from sweeper.store import recovery, tables
from sweeper.store.database import Store
from sweeper.store.studies import StoredStudy
from sweeper.store.tables import FACTS, TRIALS, VALUES
from sweeper.store.view import STATE, STATES, TrialRow, row_of, standing
from sweeper.study.spec import StudySpec

_ENDED: Final = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_YOUNGEST: Final = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A study at one moment.

    ``counts`` and ``outcomes`` are those of :class:`~sweeper.store.view.Standing`. ``due`` trials
    ended, are to be tried again, and have no successor yet; they count as ``waiting``.
    ``best`` is the completed trial with the best first objective, ``running`` are the running ones,
    ``news`` those that ended since an earlier look. ``mean_seconds`` is what the youngest trials
    that completed or were pruned took. ``finished`` are the ids of all trials that have ended.
    """

    spec: StudySpec
    counts: Mapping[str, int]
    outcomes: Mapping[str, int]
    due: int
    best: TrialRow | None
    running: tuple[TrialRow, ...]
    news: tuple[TrialRow, ...]
    mean_seconds: float | None
    finished: frozenset[int]

    @property
    def budget(self) -> int:
        """The trials that the study is to end, ended ones included."""
        return sum(self.counts[state] for state in STATES)

    @property
    def ended(self) -> int:
        return sum(self.counts[state] for state in ("complete", "pruned", "failed"))

    @property
    def over(self) -> bool:
        """Whether nothing is running or waiting."""
        return self.ended == self.budget


def progress(store: Store, study: StoredStudy, *, since: Progress | None = None) -> Progress:
    """Look at the study; ``news`` is what ended after ``since``."""
    with store.reading() as connection:
        counts = _counts(connection, study.id)
        due = recovery.due_ids(connection, study.id, study.spec)
        replaced = recovery.replaced(connection, study.id)
        counts["failed"] -= len(replaced) + len(due)
        counts["waiting"] += len(due)
        counts["retried"] = len(replaced)
        finished = frozenset(_ids(connection, study.id, _ENDED))
        chosen = [
            set() if since is None else finished - since.finished,
            set(_ids(connection, study.id, [TrialState.RUNNING])),
            set(_best_ids(connection, study)),
        ]
        trials = {t._trial_id: t for t in tables.read(connection, set().union(*chosen))}
        states = dict.fromkeys(replaced, "retried") | dict.fromkeys(due, "waiting")
        news, running, best = (
            tuple(
                row_of(study.spec, trials[i], states.get(trials[i].number, STATE[trials[i].state]))
                for i in sorted(ids)
            )
            for ids in chosen
        )
        return Progress(
            spec=study.spec,
            counts=counts,
            outcomes=_outcomes(connection, study.id),
            due=len(due),
            best=best[0] if best else None,
            running=running,
            news=news,
            mean_seconds=_mean_seconds(connection, study.id),
            finished=finished,
        )


def is_over(store: Store, study: StoredStudy) -> bool:
    """Whether nothing is running, waiting, or to be tried again."""
    if store.remote:
        return standing(store, study).over
    with store.reading() as connection:
        counts = _counts(connection, study.id)
        if counts["running"] or counts["waiting"]:
            return False
        return not recovery.due_ids(connection, study.id, study.spec)


def best_value(store: Store, study: StoredStudy) -> float | None:
    """The best first objective of a completed trial, or None before there is one."""
    if store.remote:
        best = standing(store, study).best
        return None if best is None else best.values[0]
    with store.reading() as connection:
        found = tables.read(connection, _best_ids(connection, study))
    return found[0].values[0] if found and found[0].values else None


def ended_since_best(store: Store, study: StoredStudy) -> int:
    """How many trials completed or were pruned after the best one did; 0 before there is one."""
    with store.reading() as connection:
        best = sqlalchemy.select(TRIALS.c.datetime_complete).where(
            TRIALS.c.trial_id.in_(_best_ids(connection, study))
        )
        query = sqlalchemy.select(sqlalchemy.func.count()).where(
            TRIALS.c.study_id == study.id,
            TRIALS.c.state.in_([TrialState.COMPLETE, TrialState.PRUNED]),
            TRIALS.c.datetime_complete > best.scalar_subquery(),
        )
        return int(connection.execute(query).scalar_one())


def failed_rows(store: Store, study: StoredStudy) -> list[TrialRow]:
    """The trials that failed and are not tried again, by number."""
    with store.reading() as connection:
        again = recovery.replaced(connection, study.id)
        again |= recovery.due_ids(connection, study.id, study.spec).keys()
        found = tables.read(connection, _ids(connection, study.id, [TrialState.FAIL]))
    return [row_of(study.spec, t, "failed") for t in found if t.number not in again]


def _counts(connection: sqlalchemy.Connection, study_id: int) -> dict[str, int]:
    """Trials by Optuna's state."""
    query = (
        sqlalchemy.select(TRIALS.c.state, sqlalchemy.func.count())
        .where(TRIALS.c.study_id == study_id)
        .group_by(TRIALS.c.state)
    )
    result = dict.fromkeys((*STATES, "retried"), 0)
    for state, count in connection.execute(query):
        result[STATE[state]] = count
    return result


def _ids(
    connection: sqlalchemy.Connection, study_id: int, states: Iterable[TrialState]
) -> list[int]:
    query = sqlalchemy.select(TRIALS.c.trial_id).where(
        TRIALS.c.study_id == study_id, TRIALS.c.state.in_(list(states))
    )
    return list(connection.execute(query).scalars())


def _best_ids(connection: sqlalchemy.Connection, study: StoredStudy) -> list[int]:
    """The id of the best completed trial, the earlier of equals; none before one completed."""
    kinds = models.TrialValueModel.TrialValueType
    rank = sqlalchemy.case(
        (VALUES.c.value_type == kinds.INF_NEG, -1), (VALUES.c.value_type == kinds.INF_POS, 1),
        else_=0,
    )  # fmt: skip
    upwards: Any = sqlalchemy.desc if study.spec.objective[0].maximize else sqlalchemy.asc
    query = (
        sqlalchemy.select(TRIALS.c.trial_id)
        .join(VALUES, VALUES.c.trial_id == TRIALS.c.trial_id)
        .where(
            TRIALS.c.study_id == study.id,
            TRIALS.c.state == TrialState.COMPLETE,
            VALUES.c.objective == 0,
        )
        .order_by(upwards(rank), upwards(VALUES.c.value), TRIALS.c.number)
        .limit(1)
    )
    return list(connection.execute(query).scalars())


def _outcomes(connection: sqlalchemy.Connection, study_id: int) -> dict[str, int]:
    """What ended attempts, retried ones included, by name; the most frequent first."""
    number = sqlalchemy.func.count()
    query = (
        sqlalchemy.select(FACTS.c.value_json, number)
        .join(TRIALS, TRIALS.c.trial_id == FACTS.c.trial_id)
        .where(TRIALS.c.study_id == study_id, FACTS.c.key == attr.OUTCOME)
        .group_by(FACTS.c.value_json)
        .order_by(number.desc(), FACTS.c.value_json)
    )
    return {json.loads(outcome): count for outcome, count in connection.execute(query)}


def _mean_seconds(connection: sqlalchemy.Connection, study_id: int) -> float | None:
    youngest = (
        sqlalchemy.select(FACTS.c.value_json)
        .join(TRIALS, TRIALS.c.trial_id == FACTS.c.trial_id)
        .where(
            TRIALS.c.study_id == study_id,
            TRIALS.c.state.in_([TrialState.COMPLETE, TrialState.PRUNED]),
            FACTS.c.key == attr.SECONDS,
        )
        .order_by(TRIALS.c.trial_id.desc())
        .limit(_YOUNGEST)
    )
    found = [float(json.loads(value)) for value in connection.execute(youngest).scalars()]
    return sum(found) / len(found) if found else None

"""All studies of a store at a glance, counted by the database: nothing here loads a trial."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy
from optuna.storages._rdb import models
from optuna.trial import TrialState

from sweeper.store import attributes as attr
from sweeper.store.attributes import Control
from sweeper.store.database import Store
from sweeper.store.refusals import reaching

_COUNTED = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_FACTS = (attr.SPEC, attr.CONTROL, attr.FINISHED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """A study and its trials by state.

    As in :class:`~sweeper.store.view.Standing`, but for a moment: a trial that is about to be tried
    again still counts as ``failed``.
    """

    study_id: int
    name: str
    counts: Mapping[str, int]
    control: Control
    finished: Any

    @property
    def budget(self) -> int:
        return sum(count for state, count in self.counts.items() if state != "retried")

    @property
    def busy(self) -> bool:
        """Whether anything is running or waiting."""
        return bool(self.counts["running"] or self.counts["waiting"])


def queued(store: Store) -> list[int]:
    """The ids of the studies that have a trial waiting, the oldest first."""
    if remote := store.remote:
        with reaching(store.url):
            return [int(study_id) for study_id in remote.call("queued")]
    trial, fact = models.TrialModel, models.StudyUserAttributeModel
    query = (
        sqlalchemy.select(trial.study_id)
        .join(fact, fact.study_id == trial.study_id)
        .where(trial.state == TrialState.WAITING, fact.key == attr.SPEC)
        .distinct()
        .order_by(trial.study_id)
    )
    with reaching(store.url), store.backend.engine.connect() as connection:
        return list(connection.execute(query).scalars())


def tallies(store: Store) -> list[Tally]:
    """Every study that sweeper started, the oldest first."""
    study, fact = models.StudyModel, models.StudyUserAttributeModel
    facts = sqlalchemy.select(study.study_id, study.study_name, fact.key, fact.value_json).join(
        fact, fact.study_id == study.study_id
    )
    with reaching(store.url), store.backend.engine.connect() as connection:
        known: dict[tuple[int, str], dict[str, Any]] = defaultdict(dict)
        for study_id, name, key, value in connection.execute(facts.where(fact.key.in_(_FACTS))):
            known[study_id, name][key] = value if key == attr.SPEC else json.loads(value)
        counts = _counts(connection)
    return [
        Tally(
            study_id=study_id,
            name=name,
            counts=counts[study_id],
            control=Control(found.get(attr.CONTROL, Control.RUN)),
            finished=found.get(attr.FINISHED),
        )
        for (study_id, name), found in sorted(known.items())
        if attr.SPEC in found
    ]


def _counts(connection: sqlalchemy.Connection) -> dict[int, dict[str, int]]:
    trial, fact = models.TrialModel, models.TrialUserAttributeModel
    result: dict[int, dict[str, int]] = defaultdict(
        lambda: dict.fromkeys((*_COUNTED.values(), "retried"), 0)
    )
    number = sqlalchemy.func.count()
    by_state = sqlalchemy.select(trial.study_id, trial.state, number).group_by(
        trial.study_id, trial.state
    )
    for study_id, state, count in connection.execute(by_state):
        result[study_id][_COUNTED[state]] += count
    replaced = (
        sqlalchemy.select(trial.study_id, number)
        .join(fact, fact.trial_id == trial.trial_id)
        .where(fact.key == attr.RETRY_OF)
        .group_by(trial.study_id)
    )
    for study_id, count in connection.execute(replaced):
        result[study_id]["retried"] += count
        result[study_id]["failed"] -= count
    return result

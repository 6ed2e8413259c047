"""Optuna's cached storage, reading no more than what can have changed, and reporting cheaply."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.trial import FrozenTrial, TrialState

from sweeper.store import tables
from sweeper.store.tables import TRIALS


class RecentStorage(_CachedStorage):
    """Optuna's cache of finished trials, for studies whose trials wait from the beginning.

    Optuna's own reads every unfinished trial anew each time it is asked for trials, which in a
    queue of ten thousand is all of them. Here a trial that waits is read once: read anew are those
    that run, those that were put back, and those that have ended since.

    Within :meth:`recent` what was read less than ``slack_s`` ago is used again: a pruner asks after
    every epoch. Where a trial has come to a rung since, through this storage, it is not.
    """

    def __init__(self, backend: RDBStorage, *, slack_s: float = 0.0) -> None:
        super().__init__(backend)
        self._slack_s = slack_s
        self._read_at: dict[int, float] = {}
        self._rung_at = -math.inf
        self._seen: dict[int, int] = {}
        self._distributions: dict[str, BaseDistribution] = {}

    @contextlib.contextmanager
    def recent(self, slack_s: float) -> Iterator[None]:
        """Let trials be up to ``slack_s`` old while the context lasts."""
        before, self._slack_s = self._slack_s, slack_s
        try:
            yield
        finally:
            self._slack_s = before

    def know(self, study_id: int, trial: FrozenTrial) -> None:
        """Remember a trial, as Optuna wants it before a parameter is set, and read no other."""
        with self._lock:
            self._add_trials_to_cache(study_id, [trial])

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """The trial, from the cache if it is finished. Raises KeyError where there is none."""
        with self._lock:
            known = self._get_cached_trial(trial_id)
        if known is not None:
            return known
        with tables.reading(self._backend.engine) as connection:
            found = tables.read(connection, [trial_id], self._distributions)
        if not found:
            raise KeyError(f"no trial has the id {trial_id}")
        return found[0]

    def set_rungs(
        self, trial_id: int, rungs: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        """Store to what rungs a trial came, and facts (user attributes) beside, all or nothing.

        Those that come to one rung at one moment, as a cohort does, are to see each other there.
        Raises UpdateFinishedTrialError where the trial has ended, KeyError where there is none.
        """
        with self._backend.engine.begin() as connection:
            tables.write_attributes(connection, trial_id, rungs, facts)
        if rungs:
            self._rung_at = time.monotonic()

    def _add_trials_to_cache(self, study_id: int, trials: list[FrozenTrial]) -> None:
        study = self._studies.setdefault(study_id, _StudyInfo())
        super()._add_trials_to_cache(study_id, trials)
        for trial in trials:
            if trial.state.is_finished():
                study.unfinished_trial_ids.discard(trial._trial_id)
            else:
                study.unfinished_trial_ids.add(trial._trial_id)

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        now, read_at = time.monotonic(), self._read_at.get(study_id, -math.inf)
        if now - read_at < self._slack_s and read_at > self._rung_at:
            return
        with self._lock, tables.reading(self._backend.engine) as connection:
            changed, seen = self._changed(connection, study_id)
            found = tables.read(connection, changed, self._distributions)
            self._add_trials_to_cache(study_id, found)
            self._seen[study_id] = seen  # last: a read that fails is done again
        self._read_at[study_id] = now

    def _changed(self, connection: sqlalchemy.Connection, study_id: int) -> tuple[set[int], int]:
        """The ids of the trials that the cache does not know as they are, and the highest id.

        Up to the oldest unfinished trial all are finished and known: they need no look. A trial
        that was put back waits with the time at which it began.
        """
        study = self._studies.setdefault(study_id, _StudyInfo())
        seen = self._seen.get(study_id, -1)
        unfinished = {trial_id for trial_id in study.unfinished_trial_ids if trial_id <= seen}
        known = min(unfinished, default=seen + 1) - 1
        query = sqlalchemy.select(TRIALS.c.trial_id).where(
            TRIALS.c.study_id == study_id,
            TRIALS.c.trial_id > known,
            sqlalchemy.or_(
                TRIALS.c.trial_id > seen,
                TRIALS.c.state != TrialState.WAITING,
                TRIALS.c.datetime_start.is_not(None),
            ),
        )
        ids = set(connection.execute(query).scalars())
        changed = {trial_id for trial_id in ids if trial_id > seen or trial_id in unfinished}
        return changed, max({seen, *ids})

"""Which trial a worker takes next: one study's until it is over, or any study's of the store.

Without a study of its own a worker serves those that are running by ``resources.priority``, the
highest first, and among equals the oldest. With nothing to do it looks ever less often, and now
and then for trials whose workers were lost: recovery needs no controller.
"""

from __future__ import annotations

import enum
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sweeper.errors import StudyNotFoundError, UsageError
from sweeper.store import (
    Control,
    Store,
    StoredStudy,
    overview,
    queue,
    recovery,
    studies,
    workers,
)
from sweeper.store.glance import is_over

_log = logging.getLogger(__name__)
_KNOWN_S: Final = 10.0
"""A study's spec, with its priority, is read again after so long."""
_LOOK_S: Final = 15.0
_LOOK_SHARE: Final = 1 / 8
"""Of ``lost_after_s``: a :class:`recovery.Lookout` that looks less than twice in it knows nothing.
A look may be late by as much again, and by a pause as long."""
_BARRED_S: Final = 300.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 5.0


class Rest(enum.Enum):
    """What a worker without a trial does."""

    WAIT = enum.auto()
    OVER = enum.auto()


@dataclass(kw_only=True)
class Work:
    """What there is to do for the worker called ``worker``.

    ``allow_imports``: trials whose model is imported by a name that the study gives count as well.
    """

    store: Store
    worker: str
    study: str | None = None
    allow_imports: bool = False
    _known: dict[int, tuple[float, StoredStudy]] = field(default_factory=dict)
    _lookouts: dict[int, recovery.Lookout] = field(default_factory=dict)
    _barred: dict[int, float] = field(default_factory=dict)
    _told: set[int] = field(default_factory=set)
    _look_at: float = 0.0
    _patience_s: float = _LOOK_S
    _idle: int = 0

    def next(self) -> tuple[StoredStudy, queue.Claim] | Rest:
        """A trial that is now this worker's, or what to do without one.

        Raises UsageError where the one study that is wanted may not be trained here.
        """
        found = self._of_one(self.study) if self.study else self._of_any()
        self._idle = self._idle + 1 if found is Rest.WAIT else 0
        return found

    def another(self, study: StoredStudy) -> queue.Claim | None:
        """One more trial of a study that this worker is at, unless another one is to come first."""
        return queue.claim(self.store, study.id, self.worker) if self._goes_on(study) else None

    def another_where(
        self, study: StoredStudy, fits: Callable[[Mapping[str, Any]], bool]
    ) -> queue.Claim | None:
        """As :meth:`another`, of the trials whose values are known and fit."""
        if not self._goes_on(study):
            return None
        return queue.claim_where(self.store, study.id, self.worker, spec=study.spec, fits=fits)

    def fits_any(self, study: StoredStudy, fits: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Whether :meth:`another_where` would find a trial."""
        return queue.fits_any(self.store, study.id, spec=study.spec, fits=fits)

    def share(self, study: StoredStudy) -> int | None:
        """How many of a study's trials this worker may have at once, so that none stays idle.

        What runs or waits, divided by the workers that are at the study or at none. None behind a
        proxy, where the other workers are not known.
        """
        trials = queue.unfinished(self.store, study.id)
        if trials is None:
            return None
        others = [
            row
            for row in workers.listed(self.store)
            if row.alive
            and row.presence.name != self.worker
            and row.presence.study in {None, study.name}
        ]
        return math.ceil(trials / (len(others) + 1))

    def _goes_on(self, study: StoredStudy) -> bool:
        if not self._runs(study):
            return False
        if self.study:
            return True
        first = next((each for each in self._queued() if not self._refused(each)), None)
        return first is not None and first.id == study.id

    def _runs(self, study: StoredStudy) -> bool:
        try:
            return studies.control(self.store, study.id) is Control.RUN
        except StudyNotFoundError:
            return False

    def pause_s(self) -> float:
        """How long to wait before the next look; idle workers of a store are never in step."""
        if self.study:
            return _FIRST_PAUSE_S
        longest = min(
            _LONGEST_PAUSE_S, self._patience_s, _FIRST_PAUSE_S * 2.0 ** min(self._idle - 1, 6)
        )
        return longest * random.uniform(0.5, 1)

    def bar(self, study: StoredStudy) -> None:
        """Leave a study that cannot be trained here to others, for some minutes."""
        self._barred[study.id] = time.monotonic() + _BARRED_S

    def _of_one(self, name: str) -> tuple[StoredStudy, queue.Claim] | Rest:
        study = studies.load(self.store, name)
        if studies.control(self.store, study.id) is not Control.RUN:
            return Rest.OVER
        if refused := self._refused(study):
            raise UsageError(refused)
        claimed = queue.claim(self.store, study.id, self.worker)
        if claimed is not None:
            return study, claimed
        self._look_after(study)
        return Rest.OVER if is_over(self.store, study) else Rest.WAIT

    def _of_any(self) -> tuple[StoredStudy, queue.Claim] | Rest:
        for study in self._queued():
            if refused := self._refused(study):
                self._tell_once(study.id, refused)
            elif self._runs(study):
                claimed = queue.claim(self.store, study.id, self.worker)
                if claimed is not None:
                    return study, claimed
        if self.store.remote is None and time.monotonic() > self._look_at:
            self._look_after_all()
        return Rest.WAIT

    def _look_after_all(self) -> None:
        """Find the lost trials of all studies; soon again where one of them waits for that."""
        self._patience_s = _LOOK_S
        for tally in overview.tallies(self.store):
            if tally.finished == tally.counts or not (
                tally.counts["running"] or tally.counts["failed"]
            ):
                continue
            try:
                study = self._study(tally.study_id)
            except UsageError as error:  # a broken study must not keep the others waiting
                self._tell_once(tally.study_id, str(error))
                continue
            self._look_after(study)
            if tally.counts["running"]:
                soon_s = study.spec.faults.lost_after_s * _LOOK_SHARE
                self._patience_s = min(self._patience_s, soon_s)
        self._look_at = time.monotonic() + self._patience_s * random.uniform(1, 2)

    def _refused(self, study: StoredStudy) -> str:
        """Why this worker must not train the study, if there is a reason."""
        imported = study.spec.imports
        if self.allow_imports or not imported:
            return ""
        return (
            f"the study {study.name!r} has its workers import {', '.join(imported)}, which must be "
            "allowed because the study comes out of the store; its trials stay in the queue. If "
            "you trust everybody who can write to this store: sweeper worker --allow-imports"
        )

    def _tell_once(self, study_id: int, why: str) -> None:
        if study_id not in self._told:
            self._told.add(study_id)
            _log.warning("%s", why)

    def _queued(self) -> list[StoredStudy]:
        now = time.monotonic()
        free = [
            study_id
            for study_id in overview.queued(self.store)
            if self._barred.get(study_id, 0.0) < now
        ]
        found = []
        for study_id in free:
            try:
                found.append(self._study(study_id))
            except UsageError as error:  # a broken study must not keep the others waiting
                self._tell_once(study_id, str(error))
                self._barred[study_id] = now + _BARRED_S
        return sorted(found, key=lambda study: (-study.spec.resources.priority, study.id))

    def _study(self, study_id: int) -> StoredStudy:
        read_at, known = self._known.get(study_id, (0.0, None))
        if known is None or time.monotonic() - read_at > _KNOWN_S:
            known = studies.load_by_id(self.store, study_id)
            self._known[study_id] = (time.monotonic(), known)
        return known

    def _look_after(self, study: StoredStudy) -> None:
        """Find lost trials, whoever's they were. Behind a proxy the controller does it."""
        if self.store.remote is not None:
            return
        lookout = self._lookouts.setdefault(study.id, recovery.Lookout(study.spec.faults))
        lookout.reap(self.store, study.id)
        if recovery.any_due(self.store, study.id, study.spec):
            with self.store.exclusively():
                recovery.reconcile(self.store, study.id, study.spec)

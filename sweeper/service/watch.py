"""All studies of a store, looked after by one long-running process.

It holds nothing that the store does not, so that two at once do no harm and any one may be killed:
lost trials are found by compare-and-set, retries and ends happen under locks, and that a study is
finished as it stands is written with the study.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from sweeper import checkpoints
from sweeper.controller import stop_if_all_alike
from sweeper.errors import (
    StoreUnreachableError,
    SweeperError,
    UsageError,
    WorkersFailedError,
)
from sweeper.service.board import Board, Snapshot
from sweeper.service.finish import Finishing
from sweeper.settings import Settings
from sweeper.store import (
    Control,
    Progress,
    Store,
    StoredStudy,
    overview,
    progress,
    recovery,
    studies,
    workers,
)
from sweeper.store.enough import stop_if_enough
from sweeper.store.overview import Tally
from sweeper.tracking import TrackingService
from sweeper.tracking.journal import pending

_log = logging.getLogger(__name__)

_KNOWN_S: Final = 30.0
_SWEEP_S: Final = 3600.0
_AGAIN_S: Final = 60.0
_PATIENCE_S: Final = 30.0
"""So long workers have for sending what they measured last, before a study is finished."""
_ENDING: Final = (Control.STOP, Control.CANCEL)


@dataclass(kw_only=True)
class Watch:
    """Looks at every study of the store. Call :meth:`look` every few seconds."""

    store: Store
    settings: Settings
    service: TrackingService
    board: Board
    allow_imports: bool = False
    _known: dict[int, tuple[float, StoredStudy]] = field(default_factory=dict)
    _lookouts: dict[int, recovery.Lookout] = field(default_factory=dict)
    _seen: dict[int, Tally] = field(default_factory=dict)
    _told: dict[int, str] = field(default_factory=dict)
    _swept: float = 0.0

    def __post_init__(self) -> None:
        self.finisher = Finisher(self._finish)

    def look(self) -> None:
        """Once over all studies. Raises StoreUnreachableError."""
        tallies = overview.tallies(self.store)
        for tally in tallies:
            if tally.finished != tally.counts:
                try:
                    self._look_at(tally)
                except UsageError as error:  # a broken study must not keep the others waiting
                    self._tell_once(tally, str(error))
        if time.monotonic() - self._swept > _SWEEP_S:
            self._swept = time.monotonic()
            workers.sweep(self.store)
        files, size = pending(self.settings.spool)
        self.board.show(
            Snapshot(
                tallies=tuple(tallies),
                workers=tuple(workers.listed(self.store)),
                spool_bytes=size,
                spool_files=files,
            )
        )

    def _look_at(self, tally: Tally) -> None:
        study = self._study(tally)
        if tally.counts["running"]:
            lookout = self._lookouts.setdefault(study.id, recovery.Lookout(study.spec.faults))
            if lost := lookout.reap(self.store, study.id):
                _log.warning("%s: the workers of the trials %s are lost", study.name, lost)
        elif self._seen.get(study.id) == tally and not _may_end(tally):
            return
        self._seen[study.id] = tally
        now = progress(self.store, study)
        if now.due:
            with self.store.exclusively():
                retried = recovery.reconcile(self.store, study.id, study.spec)
            _log.info("%s: the trials %s are tried again", study.name, retried)
            return
        if tally.control is Control.RUN:
            self._stop_if_hopeless(study, now)
            if reason := stop_if_enough(self.store, study, now):
                _log.info("%s has enough: %s", study.name, reason)
        if _is_over(now, tally.control):
            self.finisher.ask(study)

    def _tell_once(self, tally: Tally, why: str) -> None:
        if self._told.get(tally.study_id) != why:
            self._told[tally.study_id] = why
            _log.error("%s cannot be looked after: %s", tally.name, why)

    def _study(self, tally: Tally) -> StoredStudy:
        read_at, known = self._known.get(tally.study_id, (0.0, None))
        if known is None or time.monotonic() - read_at > _KNOWN_S:
            known = studies.load(self.store, tally.name)
            self._known[tally.study_id] = (time.monotonic(), known)
        return known

    def _stop_if_hopeless(self, study: StoredStudy, now: Progress) -> None:
        try:
            stop_if_all_alike(self.store, study, now)
        except WorkersFailedError as error:
            _log.error("%s", error)
            studies.ask(self.store, study.id, Control.STOP, why=str(error))

    def _finish(self, study: StoredStudy) -> bool:
        """Finish a study, unless another process does or did; whether that is done with."""
        with self.store.alone(study.id) as mine:
            if not mine:
                return True
            with self.store.exclusively():  # whoever enqueues trials just now is through then
                study = studies.load(self.store, study.name)
                now = progress(self.store, study)
                control = studies.control(self.store, study.id)
            if not _is_over(now, control) or studies.finished(self.store, study.id, now.counts):
                return True
            _log.info("%s is over: %s", study.name, now.counts)
            finished = Finishing(
                store=self.store,
                settings=self.settings,
                service=self.service,
                say=lambda text: _log.debug("%s: %s", study.name, text),
                warn=lambda text: _log.warning("%s: %s", study.name, text),
                allow_imports=self.allow_imports,
                patience_s=_PATIENCE_S,
            ).finish(study)
            if finished.problem:
                return False
            if now.over:
                checkpoints.remove_study(self.settings.checkpoints, study.identity)
            studies.remember_finished(self.store, study.id, now.counts)
            _log.info("%s is finished, its report is %s", study.name, finished.page)
        return True


class Finisher:
    """Finishes studies one after the other in a thread: a report may take minutes."""

    def __init__(self, finish: Callable[[StoredStudy], bool]) -> None:
        self._finish = finish
        self._changed = threading.Condition()
        self._asked: dict[int, StoredStudy] = {}
        self._not_before: dict[int, float] = {}
        self._current: int | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="finisher", daemon=True)
        self._thread.start()

    def ask(self, study: StoredStudy) -> None:
        """Have a study finished, once it is its turn; one that is being finished is not queued."""
        with self._changed:
            waits = time.monotonic() < self._not_before.get(study.id, 0.0)
            if not waits and study.id != self._current:
                self._asked.setdefault(study.id, study)
                self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Begin nothing more; whether what is in hand was ended in time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._asked) or self._closed)
                if self._closed:
                    return
                study_id = next(iter(self._asked))
                study = self._asked.pop(study_id)
                self._current = study_id
            done = False
            try:
                done = self._finish(study)
            except StoreUnreachableError as error:
                _log.warning("%s cannot be finished yet: %s", study.name, error)
            except SweeperError as error:
                _log.error("%s cannot be finished: %s", study.name, error)
            except Exception:  # noqa: BLE001 - one study's end must not be the others'
                _log.exception("%s cannot be finished", study.name)
            with self._changed:
                self._current = None
                if not done:
                    self._not_before[study_id] = time.monotonic() + _AGAIN_S


def _may_end(tally: Tally) -> bool:
    return not tally.busy or tally.control in _ENDING


def _is_over(now: Progress, control: Control) -> bool:
    """Whether nothing more is to come: all trials ended, or it was stopped and none is running."""
    counts = now.counts
    ended = now.over or (control in _ENDING and not counts["running"])
    return ended and now.budget > 0

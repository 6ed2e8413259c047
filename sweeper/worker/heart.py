"""The thread that beats for the trials in hand, and for the worker itself among its kind."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from sweeper.errors import StoreUnreachableError
from sweeper.store import Control, Store, StoredStudy, held, queue, studies, workers
from sweeper.store.workers import Presence
from sweeper.worker.signals import Signals

_log = logging.getLogger(__name__)
_TELL_S: Final = 10.0
"""A worker without a trial says so often that it is there."""
_GATHER_S: Final = 1.0
"""Trials that join others are told of together: a beat follows no sooner than so long after the one
before. Nobody waits for it, a claim is a beat."""


class Heart(threading.Thread):
    """Beats for the trials in hand, all of one study, and looks what the study is asked for.

    It outlives database errors: a beat that fails is tried again with the next one. When the
    process that started the worker is gone, the worker is told to stop as by a signal.
    """

    def __init__(
        self, store: Store, signals: Signals, presence: Presence, *, parent: int | None
    ) -> None:
        super().__init__(name="heart", daemon=True)
        self._store = store
        self._signals = signals
        self._presence = presence
        self._told = 0.0
        self._ended = False
        self._parent = parent
        self._claims: tuple[queue.Claim, ...] = ()
        self._study_id: int | None = None
        self._interval_s = 10.0
        self._missed = 0
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self.asked = Control.RUN
        self.samples_per_s: float | None = None

    @contextlib.contextmanager
    def beating(self, study: StoredStudy, claimed: queue.Claim) -> Iterator[None]:
        """Beat for ``claimed`` as long as the context lasts, beside others of the same study."""
        with self._lock:
            if not self._claims:
                self._interval_s = study.spec.faults.heartbeat_s
                self._study_id = study.id
                self.asked = Control.RUN
            self._hold((*self._claims, claimed), study.name)
        self._wake.set()
        try:
            yield
        finally:
            with self._lock:
                rest = tuple(each for each in self._claims if each is not claimed)
                self._hold(rest, study.name)

    def _hold(self, claims: tuple[queue.Claim, ...], study: str) -> None:
        self._claims = claims
        numbers = tuple(claimed.number for claimed in claims)
        self._presence = replace(self._presence, study=study if claims else None, trials=numbers)
        if claims:
            self._presence = replace(self._presence, problem=None)
        else:
            self.samples_per_s = None

    def say(self, problem: str) -> None:
        """Show what keeps the worker from a study."""
        self._presence = replace(self._presence, problem=problem)

    def leave(self) -> None:
        """Take the worker from the list; it is swept from there later if this does not work."""
        self._ended = True
        with contextlib.suppress(StoreUnreachableError):
            workers.leave(self._store, self._presence.name)

    def run(self) -> None:
        while True:
            self._wake.wait(timeout=self._interval_s if self._claims else 1.0)
            if len(self._claims) > 1 and (since_s := time.monotonic() - self._told) < _GATHER_S:
                time.sleep(_GATHER_S - since_s)
            self._wake.clear()
            if self._parent is not None and os.getppid() != self._parent:
                _log.warning("the process that started this worker is gone; stopping")
                self._parent = None
                self._signals.stop()
            with self._lock:
                claims, study_id = self._claims, self._study_id
            if not claims and time.monotonic() - self._told < _TELL_S:
                continue
            try:
                if claims:
                    held.beat(self._store, claims)
                if claims and study_id is not None:
                    self._heard(studies.control(self._store, study_id), study_id, claims)
                self._tell()
                self._missed = 0
            except Exception as error:  # noqa: BLE001 - a beat must never end the thread
                self._missed += 1
                level = logging.WARNING if self._missed == 1 else logging.DEBUG
                _log.log(level, "a heartbeat did not reach the store: %s", error)

    def _heard(self, asked: Control, study_id: int, claims: tuple[queue.Claim, ...]) -> None:
        """Take what the study was asked for, unless the worker is done with all of these trials:
        those that it has since may be another study's, or this one's after it was resumed."""
        with self._lock:
            if study_id == self._study_id and any(each in self._claims for each in claims):
                self.asked = asked

    def _tell(self) -> None:
        if not self._ended:
            self._told = time.monotonic()
            workers.tell(self._store, replace(self._presence, samples_per_s=self.samples_per_s))

"""The thread that beats for the trial in hand, and looks what the study is asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

from sweeper.store import Control, Store, StoredStudy, queue, studies
from sweeper.worker.signals import Signals

_log = logging.getLogger(__name__)


class Heart(threading.Thread):
    """Beats for the trial in hand, and looks what the study is asked for.

    It outlives database errors: a beat that fails is tried again with the next one. When the
    process that started the worker is gone, the worker is told to stop as by a signal.
    """

    def __init__(self, store: Store, signals: Signals, *, parent: int | None) -> None:
        super().__init__(name="heart", daemon=True)
        self._store = store
        self._signals = signals
        self._parent = parent
        self._claim: queue.Claim | None = None
        self._study_id: int | None = None
        self._interval_s = 10.0
        self._missed = 0
        self._wake = threading.Event()
        self.asked = Control.RUN

    @contextlib.contextmanager
    def beating(self, study: StoredStudy, claimed: queue.Claim) -> Iterator[None]:
        """Beat for ``claimed`` as long as the context lasts."""
        self._interval_s = study.spec.faults.heartbeat_s
        self._study_id, self._claim = study.id, claimed
        self.asked = Control.RUN
        self._wake.set()
        try:
            yield
        finally:
            self._claim = None

    def run(self) -> None:
        while True:
            self._wake.wait(timeout=self._interval_s if self._claim else 1.0)
            self._wake.clear()
            if self._parent is not None and os.getppid() != self._parent:
                _log.warning("the process that started this worker is gone; stopping")
                self._parent = None
                self._signals.stop()
            claimed, study_id = self._claim, self._study_id
            if claimed is None or study_id is None:
                continue
            try:
                queue.beat(self._store, claimed)
                self.asked = studies.control(self._store, study_id)
                self._missed = 0
            except Exception as error:  # noqa: BLE001 - a beat must never end the thread
                self._missed += 1
                level = logging.WARNING if self._missed == 1 else logging.DEBUG
                _log.log(level, "a heartbeat did not reach the store: %s", error)

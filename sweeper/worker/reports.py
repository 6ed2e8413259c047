"""Every epoch's value on its way to the store, so that training need not wait for it.

Where a pruner decides, training waits the few milliseconds until a report is stored and the answer
is there: a trial is pruned at the epoch where it should be. When the store is away, training goes
on, the thread tries again, and a decision to prune comes when it comes. Where nothing is to be
decided, training does not wait at all.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Final

from sweeper.errors import StoreRefusedError, StoreUnreachableError, TrialLostError
from sweeper.store import Store, StoredStudy, held, queue
from sweeper.worker.patience import pause_s

_log = logging.getLogger(__name__)
_WAIT_S: Final = 10.0
"""So long training waits for an answer before it takes the store for away."""


class Reports:
    """The reports of one attempt. ``store`` has them in the order of the epochs."""

    def __init__(self, store: Store, study: StoredStudy, claimed: queue.Claim) -> None:
        self._store = store
        self._study = study
        self._claimed = claimed
        self._changed = threading.Condition()
        self._due: deque[tuple[int, float, bool]] = deque()
        self._prunes = held.prunes(study.study)
        self._told: dict[int, float] = {}
        self._away = self._closed = self._prune = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def tell(self, epoch: int, value: float, *, decide: bool = True) -> bool:
        """Report the first objective after ``epoch``; whether the pruner ends the trial.

        Without ``decide`` the pruner is not asked. Raises TrialLostError where the store has given
        the trial to another worker, as soon as that is known, and whatever else ended the thread.
        """
        with self._changed:
            decide = decide and self._prunes
            self._due.append((epoch, value, decide))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            waits = decide and not self._away
            if waits and not self._changed.wait_for(self._settled, _WAIT_S):
                self._away = True
                _log.warning("the store does not answer; training goes on")
            self._raise()
            return self._prune

    @property
    def lost(self) -> bool:
        """Whether the store has given the trial to another worker. Does not wait."""
        return isinstance(self._error, TrialLostError)

    def settle(self, timeout_s: float) -> bool:
        """Wait until every report is stored; whether they are. Raises as :meth:`tell`."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._due or self._ended, timeout_s)
            self._raise()
            return done

    def close(self) -> None:
        """End the thread; what the store does not have yet is given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _settled(self) -> bool:
        return not self._due or self._away or self._ended

    @property
    def _ended(self) -> bool:
        return self._error is not None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._due) or self._closed)
                if self._closed:
                    return
                epoch, value, decide = self._due[0]
                decide = decide and len(self._due) == 1
            try:
                held.report(self._store, self._claimed, epoch, value)
                self._told[epoch] = value
                prune = decide and held.should_prune(
                    self._store, self._study.study, self._claimed, epoch, self._told
                )
            except StoreRefusedError as error:
                self._end(error)
                return
            except StoreUnreachableError as error:
                failures += 1
                self._hold_out(failures, error)
                continue
            except Exception as error:  # noqa: BLE001 - raised again in the training thread
                self._end(error)
                return
            if failures:
                _log.info("the store answers again, %d reports were missing", len(self._due))
            failures = 0
            with self._changed:
                self._due.popleft()
                self._prune = self._prune or prune
                self._away = self._away and bool(self._due)
                self._changed.notify_all()

    def _end(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _hold_out(self, failures: int, error: StoreUnreachableError) -> None:
        if failures == 1:
            _log.warning("a report did not reach the store, training goes on: %s", error)
        with self._changed:
            self._away = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed, pause_s(failures))

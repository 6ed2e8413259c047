"""Every epoch's value on its way to the store, so that training need not wait for it.

Where a pruner decides, training waits the few milliseconds until a report is stored and the answer
is there: a trial is pruned at the epoch where it should be. When the store is away, training goes
on, the thread tries again, and a decision to prune comes when it comes. Where nothing is to be
decided, training does not wait at all.

A worker has one thread for all of its trials, and what they say of one epoch is one transaction:
those of a cohort first hand in their reports, and only then is the first one's verdict asked for.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sweeper.errors import StoreRefusedError, StoreUnreachableError, TrialLostError
from sweeper.store import Store, StoredStudy, held, queue
from sweeper.worker.patience import pause_s

_log = logging.getLogger(__name__)
_WAIT_S: Final = 10.0
"""So long training waits for an answer before it takes the store for away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """The first objective after an epoch, and whether the pruner is to be asked then."""

    epoch: int
    value: float
    decide: bool


class Reports:
    """The reports of one attempt. ``store`` has them in the order of the epochs.

    ``due`` are those that the store lacks, ``told`` those that it has (epoch → value), from before
    a checkpoint too, ``error`` is what ended them. The reporter's ``changed`` guards all of it.
    """

    def __init__(
        self,
        reporter: Reporter,
        study: StoredStudy,
        claimed: queue.Claim,
        *,
        told: Mapping[int, float] | None = None,
    ) -> None:
        self.study = study
        self.claimed = claimed
        self.due: deque[_Report] = deque()
        self.told = dict(told or {})
        self.prune = False
        self.error: Exception | None = None
        self._reporter = reporter
        self._changed = reporter.changed
        self._prunes = held.prunes(study.study)
        self._waits = False
        reporter.add(self)

    def tell(self, epoch: int, value: float, *, decide: bool = True) -> bool:
        """Report the first objective after ``epoch``; whether the pruner ends the trial.

        Without ``decide`` the pruner is not asked. Raises TrialLostError where the store has given
        the trial to another worker, as soon as that is known, and whatever else ended the reports.
        """
        self.put(epoch, value, decide=decide)
        return self.verdict()

    def put(self, epoch: int, value: float, *, decide: bool = True) -> None:
        """The first half of :meth:`tell`: hand a report in, which is on its way from the next
        :meth:`verdict` of any attempt on."""
        with self._changed:
            self._raise()
            self._waits = decide and self._prunes
            self.due.append(_Report(epoch=epoch, value=value, decide=self._waits))

    def verdict(self) -> bool:
        """The second half of :meth:`tell`: whether the pruner ends the trial."""
        with self._changed:
            if self.due:
                self._reporter.send()
            if self._waits:
                self._reporter.wait_for(self._settled)
            self._raise()
            return self.prune

    @property
    def lost(self) -> bool:
        """Whether the store has given the trial to another worker. Does not wait."""
        return isinstance(self.error, TrialLostError)

    def settle(self, timeout_s: float) -> bool:
        """Wait until every report is stored; whether they are. Raises as :meth:`tell`."""
        with self._changed:
            if self.due:
                self._reporter.send()
            done = self._changed.wait_for(self._settled, timeout_s)
            self._raise()
            return done

    def close(self) -> None:
        """Report no more; what the store does not have yet is given up."""
        self._reporter.remove(self)

    def _settled(self) -> bool:
        return not self.due or self.error is not None

    def _raise(self) -> None:
        if self.error is not None:
            raise _anew(self.error)


def _anew(error: Exception) -> Exception:
    """The same error to be raised in another place: what is kept of it learns nothing of the frames
    there, which hold a model. One that cannot be copied is that error itself."""
    try:
        found = copy.copy(error).with_traceback(error.__traceback__)
    except Exception:  # noqa: BLE001 - a pruner may raise whatever it likes
        return error
    found.__cause__, found.__context__ = error.__cause__, error.__context__
    found.__suppress_context__ = error.__suppress_context__
    return found


_Batch = Mapping[Reports, Sequence[_Report]]


class Reporter:
    """The thread that stores the reports of all attempts of one worker.

    It takes whatever is due, stores that in one transaction, asks the pruner for those that it is
    to decide about, and then lets everybody know. ``changed`` guards its attempts' reports.
    """

    def __init__(self, store: Store) -> None:
        self.changed = threading.Condition()
        self._database = store
        self._reports: dict[Reports, None] = {}
        self._thread: threading.Thread | None = None
        self._sent = self._away = self._closed = False
        self._failures = 0

    def add(self, reports: Reports) -> None:
        """Report for one more attempt."""
        with self.changed:
            self._reports[reports] = None

    def remove(self, reports: Reports) -> None:
        """Report no more for an attempt; the others do not notice."""
        with self.changed:
            self._reports.pop(reports, None)

    def send(self) -> None:
        """Let the thread take what is due. For who holds ``changed``."""
        self._sent = True
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="reports", daemon=True)
            thread.start()
            self._thread = thread
        self.changed.notify_all()

    def wait_for(self, settled: Callable[[], bool]) -> None:
        """Wait, but not for a store that is away. For who holds ``changed``."""
        if not self.changed.wait_for(lambda: self._away or settled(), _WAIT_S):
            self._away = True  # for all: those that wait one after the other wait once
            _log.warning("the store does not answer; training goes on")

    def close(self) -> None:
        """End the thread."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def _run(self) -> None:
        while self._once():
            pass

    def _once(self) -> bool:
        """Wait for a batch and store it; whether there can be another. Nothing of the batch is left
        when this returns: whoever is over is not to be kept until somebody else reports."""
        batch = self._taken()
        if not batch:  # an empty one, of attempts that are over, the store is not asked about
            return batch is not None
        try:
            self._store(batch)
        except StoreRefusedError as error:
            self._failures = 0
            self._end(batch, error)
        except StoreUnreachableError as error:
            self._failures += 1
            self._hold_out(self._failures, error)
        else:
            if self._failures:
                missing = sum(map(len, batch.values()))
                _log.info("the store answers again, %d reports were missing", missing)
            self._failures = 0
            with self.changed:
                self._away = False
                self.changed.notify_all()
        return True

    def _taken(self) -> _Batch | None:
        """What is due, as soon as any of it was sent; None at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self._sent or self._closed)
            if self._closed:
                return None
            self._sent = False
            return {each: tuple(each.due) for each in self._reports if each.due and not each.error}

    def _store(self, batch: _Batch) -> None:
        """Store a batch and decide. Where that fails half-way, who has an answer is not asked about
        again, and the others' reports are written once more."""
        lost = self._written(batch)
        for reports, due in batch.items():
            with self.changed:
                if reports.error or reports not in self._reports:
                    continue
            if reports.claimed.trial_id in lost:
                self._end([reports], TrialLostError())
            else:
                self._decide(reports, due)

    def _written(self, batch: _Batch) -> set[int]:
        """Write a batch in one transaction; the ids of the trials that were lost.

        What fails in a way that no store fails is written one by one, and ends who is to blame.
        """
        try:
            return held.report_all(
                self._database,
                {
                    reports.claimed.trial_id: {report.epoch: report.value for report in due}
                    for reports, due in batch.items()
                },
            )
        except StoreUnreachableError:
            raise
        except Exception as error:  # noqa: BLE001 - raised again in the training thread
            if len(batch) == 1:
                self._end(batch, error)
                return set()
        return {lost for reports, due in batch.items() for lost in self._written({reports: due})}

    def _decide(self, reports: Reports, due: Sequence[_Report]) -> None:
        """Ask the pruner about the newest report, if it is to decide about that."""
        study, claimed, newest = reports.study.study, reports.claimed, due[-1]
        reports.told.update((report.epoch, report.value) for report in due)
        try:
            prune = newest.decide and held.should_prune(
                self._database, study, claimed, newest.epoch, reports.told
            )
        except StoreUnreachableError:
            raise
        except Exception as error:  # noqa: BLE001 - raised again in the training thread
            self._end([reports], error)
            return
        with self.changed:
            for _ in due:
                reports.due.popleft()
            reports.prune = reports.prune or prune

    def _end(self, batch: Iterable[Reports], error: Exception) -> None:
        with self.changed:
            for reports in batch:
                reports.error = error
            self.changed.notify_all()

    def _hold_out(self, failures: int, error: StoreUnreachableError) -> None:
        if failures == 1:
            _log.warning("a report did not reach the store, training goes on: %s", error)
        with self.changed:
            self._away = self._sent = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: self._closed, pause_s(failures))

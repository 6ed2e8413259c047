"""The worker's loop: claim a trial, train it, and again until nothing is left.

A worker needs the store's address and nothing else: the study's spec is in the store. It never
creates a trial (see `sweeper.store.queue`), and it never waits for the tracker. Where the store
does not answer it waits for up to an hour; a trial in training goes on meanwhile.

TERM or INT once: the running epoch is finished if that takes less than ``faults.grace_s``, the
trial goes back to the queue with a checkpoint, the worker ends. Twice: the trial goes back at once.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from sweeper import settings as names
from sweeper.config import DataConfig, TrialConfig
from sweeper.errors import (
    DataNotFoundError,
    MissingExtraError,
    SweeperError,
    TrialLostError,
    UsageError,
)
from sweeper.settings import Settings
from sweeper.store import Control, Outcome, Store, StoredStudy, held, queue
from sweeper.store.workers import Presence
from sweeper.tracking import Tracker
from sweeper.worker.attempt import Attempt
from sweeper.worker.cohorts import Cohorts, out_of_memory
from sweeper.worker.heart import Heart
from sweeper.worker.patience import patiently
from sweeper.worker.reports import Reporter
from sweeper.worker.signals import Signals, StopNowError
from sweeper.worker.work import Rest, Work

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    from sweeper.data import Dataset

_log = logging.getLogger(__name__)
_RESERVE_S: Final = 5.0
"""So much of the grace after a signal is kept for the checkpoint and for giving the trial back."""


@dataclass(kw_only=True)
class Worker:
    """One worker process. ``study``: train this study's trials until it is over; None: serve all
    running studies of the store, and wait for more. ``allow_imports``: whether a study of the store
    may have this machine import a model of its own; without, its trials stay in the queue."""

    store: Store
    tracker: Tracker
    settings: Settings
    study: str | None = None
    name: str = field(default_factory=names.worker_name)
    parent: int | None = None
    allow_imports: bool = False
    signals: Signals = field(default_factory=Signals)
    reporter: Reporter = field(init=False)
    _dataset: tuple[DataConfig, Dataset] | None = None
    _next: Attempt | None = None

    def run(self) -> bool:
        """Work until the study is over, a signal arrives, or something cannot be done.

        Whether the study is over: False where a signal came before that was known.
        Raises UsageError where no trial of the study can run here (data, packages, imports).
        """
        import sweeper.training  # noqa: F401 - seconds that are not to count as the first trial's

        self._work = Work(
            store=self.store,
            worker=self.name,
            study=self.study,
            allow_imports=self.allow_imports,
        )
        self._heart = Heart(self.store, self.signals, self._presence(), parent=self.parent)
        self._heart.start()
        self.reporter = Reporter(self.store)
        self._cohorts = Cohorts(worker=self, work=self._work)
        over = False
        try:
            while not self.signals.stopping and not over:
                over = not self._work_once()
        except StopNowError:
            pass
        finally:
            if self._next is not None:
                self._next.give_back()
                self._next.close()
            self.reporter.close()
            self._heart.leave()
        return over

    def _presence(self) -> Presence:
        from sweeper.training.device import visible

        found = visible()
        return Presence(
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=", ".join(name for name, _ in found) or "cpu",
            launcher=names.launcher_name(),
        )

    def _work_once(self) -> bool:
        """Train one trial, or wait a moment where there is none. False: nothing is left to do."""
        if self._next is not None:
            attempt, self._next = self._next, None
            self._train_or_bar(attempt)
            return True
        found = patiently(self._work.next, "look for work", self.signals)
        if found is Rest.OVER:
            return False
        if found is Rest.WAIT:
            until = time.monotonic() + self._work.pause_s()
            while time.monotonic() < until and not self.signals.stopping:
                time.sleep(0.1)
            return True
        study, claimed = found
        self._train_or_bar(self.taken(study, claimed))
        return True

    def taken(self, study: StoredStudy, claimed: queue.Claim) -> Attempt:
        """A claimed trial for which the heart beats until it is closed."""
        attempt = Attempt(worker=self, study=study, claimed=claimed)
        attempt.background.enter_context(self._heart.beating(study, claimed))
        return attempt

    def _train_or_bar(self, attempt: Attempt) -> None:
        study = attempt.study
        try:
            self._train(attempt)
        except (DataNotFoundError, MissingExtraError) as error:
            if self.study:
                raise
            _log.error("%s cannot be trained here, it is left to others: %s", study.name, error)
            self._heart.say(f"{study.name}: {error}")
            self._work.bar(study)

    def _train(self, attempt: Attempt) -> None:
        """Train one trial, alone or with others, to whatever end it finds.

        Only what no trial survives is raised.
        """
        together = None
        try:
            with self.fate_of(attempt):
                together = self._cohorts.around(attempt)
                if together is None:
                    attempt.run()
        finally:
            if together is None:
                attempt.close()
        if together is not None:
            self._next = together.run(attempt)

    @contextlib.contextmanager
    def fate_of(self, attempt: Attempt) -> Iterator[None]:
        """Give the trial the end that belongs to what is raised in the context.

        Only what no trial survives is raised on.
        """
        try:
            yield
        except TrialLostError:
            _log.warning("trial %d was given to another worker; dropped", attempt.claimed.number)
        except (StopNowError, DataNotFoundError, MissingExtraError):
            attempt.give_back()
            raise
        except (UsageError, ValidationError) as error:
            if out_of_memory(error):  # while a step was captured
                self.run_out_of_memory(attempt, traceback.format_exc())
            else:
                attempt.fail(Outcome.INVALID, str(error))
        except SweeperError:
            attempt.give_back()
            raise
        except MemoryError:
            self.run_out_of_memory(attempt, traceback.format_exc())
        except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
            if out_of_memory(error):
                self.run_out_of_memory(attempt, traceback.format_exc())
            else:
                attempt.fail(Outcome.CRASHED, traceback.format_exc())

    def run_out_of_memory(self, attempt: Attempt, error: str) -> None:
        """End the trial, and hold nothing that the next one may need."""
        self._dataset = None
        attempt.fail(Outcome.OUT_OF_MEMORY, error)
        self.free_memory()

    def free_memory(self) -> None:
        """Give back to the device what nobody holds any more."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def out_of_time(self, study: StoredStudy) -> bool:
        """Whether the grace after a signal leaves no time to finish an epoch."""
        signals, grace_s = self.signals, study.spec.faults.grace_s
        return signals.stopping and signals.waited_s() >= grace_s - min(_RESERVE_S, grace_s / 3)

    def loaded(self, config: TrialConfig) -> Dataset:
        """The data set of a trial, from the trial before where it had the same."""
        from sweeper.data import load
        from sweeper.training import best_device

        found = self.dataset_for(config)
        if found is None:
            found = load(config.data, folder=self.settings.data, device=best_device())
            self.keep(config, found)
        return found

    def dataset_for(self, config: TrialConfig) -> Dataset | None:
        """The data set of the trial before, where this one has the same."""
        return self._dataset[1] if self._dataset and self._dataset[0] == config.data else None

    def keep(self, config: TrialConfig, dataset: Dataset) -> None:
        """Remember a trial's data set for the next."""
        self._dataset = (config.data, dataset)

    @property
    def asked(self) -> Control:
        """What the study was asked for at the last heartbeat."""
        return self._heart.asked

    def note_throughput(self, samples_per_s: float | None) -> None:
        """What the last epoch reached, for those who look at the workers."""
        self._heart.samples_per_s = samples_per_s


def run_ids_into(store: Store) -> Callable[[str, str], None]:
    """A callback for the tracker that stores a run's id with its trial."""

    def remember(key: str, run_id: str) -> None:
        study_name, _, origin = key.rpartition("/")
        if origin.isdigit():
            held.remember_run(store, study_name, int(origin), run_id)

    return remember

"""The worker's loop: claim a trial, train it, and again until nothing is left.

A worker needs the store's address and nothing else: the study's spec is in the store. It never
creates a trial (see `sweeper.store.queue`), and it never waits for the tracker. Where the store
does not answer it waits for up to an hour; a trial in training goes on meanwhile.

TERM or INT once: the running epoch is finished if that takes less than ``faults.grace_s``, the
trial goes back to the queue with a checkpoint, the worker ends. Twice: the trial goes back at once.
"""

from __future__ import annotations

import enum
import gc
import logging
import time
import traceback
from collections.abc import Callable
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
from sweeper.store import Control, Outcome, Store, StoredStudy, queue, recovery, standing, studies
from sweeper.tracking import Tracker
from sweeper.worker.attempt import Attempt
from sweeper.worker.heart import Heart
from sweeper.worker.patience import patiently
from sweeper.worker.signals import Signals, StopNowError

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    from sweeper.data import Dataset

_log = logging.getLogger(__name__)
_IDLE_PAUSE_S: Final = 0.5


class _Rest(enum.Enum):
    """What a worker without a trial does."""

    WAIT = enum.auto()
    OVER = enum.auto()


@dataclass(kw_only=True)
class Worker:
    """One worker process. ``study``: train this study's trials until it is over; None: serve all
    running studies of the store, and wait for more."""

    store: Store
    tracker: Tracker
    settings: Settings
    study: str | None = None
    name: str = field(default_factory=names.worker_name)
    parent: int | None = None
    signals: Signals = field(default_factory=Signals)
    _dataset: tuple[DataConfig, Dataset] | None = None
    _lookouts: dict[str, recovery.Lookout] = field(default_factory=dict)

    def run(self) -> None:
        """Work until the study is over, a signal arrives, or something cannot be done.

        Raises UsageError where no trial of the study can run here (data, packages).
        """
        import sweeper.training  # noqa: F401 - seconds that are not to count as the first trial's

        self._heart = Heart(self.store, self.signals, parent=self.parent)
        self._heart.start()
        while not self.signals.stopping:
            try:
                if not self._work_once():
                    return
            except StopNowError:
                return

    def _work_once(self) -> bool:
        """Train one trial, or wait a moment where there is none. False: nothing is left to do."""
        found = patiently(self._look_for_work, "look for work", self.signals)
        if found is _Rest.OVER:
            return False
        if found is _Rest.WAIT:
            time.sleep(_IDLE_PAUSE_S)
            return True
        study, claimed = found
        with self._heart.beating(study, claimed):
            self._train(study, claimed)
        return True

    def _look_for_work(self) -> tuple[StoredStudy, queue.Claim] | _Rest:
        wanted = [self.study] if self.study else studies.names(self.store)
        for name in wanted:
            study = studies.load(self.store, name)
            if studies.control(self.store, study.id) is not Control.RUN:
                if self.study:
                    return _Rest.OVER
                continue
            claimed = queue.claim(self.store, study.id, self.name)
            if claimed is not None:
                return study, claimed
            self._look_after(study)
            if self.study and standing(self.store, study).over:
                return _Rest.OVER
        return _Rest.WAIT

    def _look_after(self, study: StoredStudy) -> None:
        """With nothing to train: find lost trials, whoever's they were."""
        lookout = self._lookouts.setdefault(study.name, recovery.Lookout(study.spec.faults))
        lookout.reap(self.store, study.id)
        if recovery.due(study.spec, self.store.storage.get_all_trials(study.id, deepcopy=False)):
            with self.store.exclusively():
                recovery.reconcile(self.store, study.id, study.spec)

    def _train(self, study: StoredStudy, claimed: queue.Claim) -> None:
        """Train one trial to whatever end it finds. Only what no trial survives is raised."""
        attempt = Attempt(worker=self, study=study, claimed=claimed)
        try:
            attempt.run()
        except TrialLostError:
            _log.warning("trial %d was given to another worker; dropped", claimed.number)
        except (StopNowError, DataNotFoundError, MissingExtraError):
            attempt.give_back()
            raise
        except (UsageError, ValidationError) as error:
            attempt.fail(Outcome.INVALID, str(error))
        except SweeperError:
            attempt.give_back()
            raise
        except MemoryError:
            self._run_out_of_memory(attempt)
        except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
            if type(error).__name__ == "OutOfMemoryError":
                self._run_out_of_memory(attempt)
            else:
                attempt.fail(Outcome.CRASHED, traceback.format_exc())
        finally:
            attempt.close()

    def _run_out_of_memory(self, attempt: Attempt) -> None:
        """End the trial, and hold nothing that the next one may need."""
        import torch

        self._dataset = None
        attempt.fail(Outcome.OUT_OF_MEMORY, traceback.format_exc())
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

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


def run_ids_into(store: Store) -> Callable[[str, str], None]:
    """A callback for the tracker that stores a run's id with its trial."""

    def remember(key: str, run_id: str) -> None:
        study_name, _, origin = key.rpartition("/")
        if origin.isdigit():
            queue.remember_run(store, study_name, int(origin), run_id)

    return remember

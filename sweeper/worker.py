"""A worker: claim a trial, train it, report every epoch, finish it; then the next.

A worker needs the store's address and nothing else: the study's spec is in the store. It never
creates a trial (see `sweeper.store.queue`), and it never waits for the tracker.

TERM or INT once: the running epoch is finished, the trial goes back to the queue, the worker ends.
Twice: the trial goes back at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
from sweeper.measurement import EPOCH_METRICS, Measurement, summary
from sweeper.provenance import environment_tags
from sweeper.settings import Settings
from sweeper.store import Control, Outcome, Store, StoredStudy, queue, standing, studies
from sweeper.store import attributes as attr
from sweeper.store.view import best_of, better
from sweeper.tracking import RunStart, Tracker

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    from sweeper.data import Dataset
    from sweeper.training import Training

_log = logging.getLogger(__name__)
_IDLE_PAUSE_S: Final = 0.5
_STATE_TAGS: Final = {
    Outcome.COMPLETED: "complete",
    Outcome.PRUNED: "pruned",
    Outcome.DIVERGED: "pruned",
    Outcome.PREEMPTED: "waiting",
}


class _StopNowError(BaseException):
    """A second signal: leave the epoch where it is."""


@dataclass(kw_only=True)
class Signals:
    """TERM and INT, counted. ``install`` has to be called from the main thread."""

    count: int = 0

    @property
    def stopping(self) -> bool:
        return self.count > 0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)

    def _received(self, number: int, _frame: object) -> None:
        self.count += 1
        if self.count > 1:
            raise _StopNowError


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
                self._signals.count = max(self._signals.count, 1)
            claimed, study_id = self._claim, self._study_id
            if claimed is None or study_id is None:
                continue
            try:
                queue.beat(self._store, claimed)
                self.asked = studies.control(self._store, study_id)
            except Exception as error:  # noqa: BLE001 - a beat must never end the thread
                _log.warning("a heartbeat did not reach the store: %s", error)


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
            except _StopNowError:
                return

    def _work_once(self) -> bool:
        """Train one trial, or wait a moment where there is none. False: nothing is left to do."""
        wanted = [self.study] if self.study else studies.names(self.store)
        for name in wanted:
            study = studies.load(self.store, name)
            if studies.control(self.store, study.id) is not Control.RUN:
                if self.study:
                    return False
                continue
            claimed = queue.claim(self.store, study.id, self.name)
            if claimed is not None:
                with self._heart.beating(study, claimed):
                    self._train(study, claimed)
                return True
            self._look_after(study)
            if self.study and standing(self.store, study).over:
                return False
        time.sleep(_IDLE_PAUSE_S)
        return True

    def _look_after(self, study: StoredStudy) -> None:
        """With nothing to train: find lost trials, whoever's they were."""
        if queue.reap(self.store, study.id, lost_after_s=study.spec.faults.lost_after_s):
            with self.store.exclusively():
                queue.reconcile(self.store, study.id, study.spec)

    def _train(self, study: StoredStudy, claimed: queue.Claim) -> None:
        """Train one trial to whatever end it finds. Only what no trial survives is raised."""
        attempt = _Attempt(worker=self, study=study, claimed=claimed)
        try:
            attempt.run()
        except TrialLostError:
            _log.warning("trial %d was given to another worker; dropped", claimed.number)
        except (_StopNowError, DataNotFoundError, MissingExtraError):
            attempt.give_back()
            raise
        except (UsageError, ValidationError) as error:
            attempt.fail(Outcome.INVALID, str(error))
        except SweeperError:
            attempt.give_back()
            raise
        except MemoryError:
            attempt.fail(Outcome.OUT_OF_MEMORY, traceback.format_exc())
        except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
            kind = (
                Outcome.OUT_OF_MEMORY
                if type(error).__name__ == "OutOfMemoryError"
                else Outcome.CRASHED
            )
            attempt.fail(kind, traceback.format_exc())

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


@dataclass(kw_only=True)
class _Attempt:
    """One claimed trial on its way through training, store and tracker."""

    worker: Worker
    study: StoredStudy
    claimed: queue.Claim
    epochs: list[Measurement] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    tracked: bool = False

    @property
    def key(self) -> str:
        """A retried trial goes on in the run of the trial it replaces."""
        return names.run_key(self.study.name, self.claimed.origin)

    def run(self) -> None:
        from sweeper.training import prepare

        spec, worker = self.study.spec, self.worker
        values = queue.values_of(spec, self.study.study, self.claimed)
        config = spec.trial_config(values)
        self._start_run(config)
        first = spec.objective[0]
        by = (
            (first.metric, first.maximize)
            if first.metric.startswith("val_")
            else ("val_accuracy", True)
        )
        training = prepare(
            config,
            folder=worker.settings.data,
            dataset=worker.dataset_for(config),
            objective=by,
        )
        worker.keep(config, training.dataset)
        self._describe(training)
        end = self._epochs(training)
        if end is None:
            return
        outcome, final = end
        if outcome is Outcome.COMPLETED:
            final = training.test()
            self._save_weights(training)
        self._finish(outcome, final)

    def _epochs(self, training: Training) -> tuple[Outcome, Mapping[str, float]] | None:
        """Train; how it ended, or None where the trial went back to the queue."""
        store, study, claimed = self.worker.store, self.study.study, self.claimed
        metric = self.study.spec.objective[0].metric
        several = len(self.study.spec.objective) > 1  # Optuna takes no reports of these
        with contextlib.closing(training.epochs()) as epochs:
            for measurement in epochs:
                self.epochs.append(measurement)
                if not measurement.finite:
                    return Outcome.DIVERGED, {}
                if not several:
                    queue.report(store, claimed, measurement.epoch, measurement.metrics[metric])
                self._log(measurement)
                if measurement.epoch >= training.config.train.epochs:
                    continue
                if queue.should_prune(store, study, claimed):
                    return Outcome.PRUNED, {}
                if self.worker.asked is Control.CANCEL:
                    return Outcome.CANCELLED, {}
                if self.worker.signals.stopping:
                    self.give_back()
                    return None
        return Outcome.COMPLETED, {}

    def _log(self, measurement: Measurement) -> None:
        if measurement.epoch > self.claimed.logged_epochs:
            self.worker.tracker.log(
                self.key, measurement.metrics, measurement.epoch, round(time.time() * 1000)
            )

    def _start_run(self, config: TrialConfig) -> None:
        self.worker.tracker.start(
            RunStart(
                key=self.key,
                experiment=self.study.name,
                name=names.run_name(self.claimed.origin),
                params=flattened(config.model_dump(mode="json")),
                tags={
                    names.STUDY_TAG: self.study.name,
                    names.ROLE_TAG: names.ROLE_TRIAL,
                    names.TRIAL_TAG: str(self.claimed.number),
                    names.STATE_TAG: "running",
                    names.ATTEMPT_TAG: str(self.claimed.attempt),
                    names.WORKER_TAG: self.worker.name,
                    **environment_tags(),
                },
                start_time_ms=round(self.started * 1000),
            )
        )
        self.tracked = True

    def _describe(self, training: Training) -> None:
        """What is known of the trial once its model and data are there."""
        queue.note(self.worker.store, self.claimed, {attr.PARAMETERS: training.parameters})
        self.worker.tracker.note(
            self.key,
            tags={f"sweeper.note.{key}": text for key, text in training.notes.items()},
            metrics={"model_parameters": float(training.parameters)},
            dataset=training.dataset.describe(),
        )

    def _values(self) -> list[float]:
        """The trial's objectives: each the value of its best epoch, or of the last."""
        result = []
        for objective in self.study.spec.objective:
            series = [epoch.metrics[objective.metric] for epoch in self.epochs]
            result.append(series[-1] if objective.at == "last" else best_of(objective, series))
        return result

    def _finish(self, outcome: Outcome, final: Mapping[str, float]) -> None:
        bad = outcome is Outcome.DIVERGED and self.study.spec.faults.on_divergence == "pruned"
        metrics = {**summary([epoch for epoch in self.epochs if epoch.finite]), **final}
        queue.finish(
            self.worker.store,
            self.study.study,
            self.claimed,
            outcome=outcome,
            ends_as="pruned" if bad else None,
            values=self._values() if outcome is Outcome.COMPLETED else (),
            facts={attr.METRICS: metrics, attr.SECONDS: time.time() - self.started},
        )
        well = bad or outcome in {Outcome.COMPLETED, Outcome.PRUNED}
        self._end_run("FINISHED" if well else "FAILED", outcome, metrics)
        _log.info("trial %d %s after %d epochs", self.claimed.number, outcome, len(self.epochs))

    def _end_run(
        self, status: str, outcome: Outcome, metrics: Mapping[str, float] | None = None
    ) -> None:
        if self.tracked:
            self.worker.tracker.end(
                self.key,
                status=status,
                metrics={
                    name: value
                    for name, value in (metrics or {}).items()
                    if name not in EPOCH_METRICS
                },
                tags={
                    names.STATE_TAG: _STATE_TAGS.get(outcome, "failed"),
                    names.OUTCOME_TAG: str(outcome),
                },
                end_time_ms=round(time.time() * 1000),
            )

    def _save_weights(self, training: Training) -> None:
        """Hand the weights to the tracker if no trial so far was better."""
        from safetensors.torch import save_file

        objective = self.study.spec.objective[0]
        best = standing(self.worker.store, self.study).best
        if best is not None and not better(objective, self._values()[0], best.values[0]):
            return
        weights = training.best_weights()
        if not weights:
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / names.WEIGHTS_FILE
            save_file({key: value.contiguous() for key, value in weights.items()}, file)
            self.worker.tracker.artifact(self.key, file, names.WEIGHTS_FOLDER)

    def give_back(self) -> None:
        """Put the trial back for another worker; nothing of it is lost but the time."""
        _log.info("trial %d goes back to the queue", self.claimed.number)
        with contextlib.suppress(TrialLostError):
            queue.put_back(self.worker.store, self.claimed)
            if self.tracked:
                self._end_run("KILLED", Outcome.PREEMPTED)

    def fail(self, outcome: Outcome, error: str) -> None:
        """End the trial as failed, with the reason."""
        _log.error("trial %d %s: %s", self.claimed.number, outcome, error)
        with contextlib.suppress(TrialLostError):
            queue.finish(
                self.worker.store,
                self.study.study,
                self.claimed,
                outcome=outcome,
                facts={attr.ERROR: error, attr.SECONDS: time.time() - self.started},
            )
            self._end_run("FAILED", outcome)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; other values as they are."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result.update(flattened(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def run_ids_into(store: Store) -> Callable[[str, str], None]:
    """A callback for the tracker that stores a run's id with its trial."""

    def remember(key: str, run_id: str) -> None:
        study_name, _, origin = key.rpartition("/")
        if origin.isdigit():
            queue.remember_run(store, study_name, int(origin), run_id)

    return remember

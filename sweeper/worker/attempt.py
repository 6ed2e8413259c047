"""One claimed trial on its way through training, store and tracker."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sweeper import checkpoints
from sweeper.checkpoints import Checkpoint, Epoch, TrialCheckpoints
from sweeper.config import TrialConfig
from sweeper.config.model import Custom
from sweeper.errors import (
    StoreRefusedError,
    StoreUnreachableError,
    TrialLostError,
    UsageError,
)
from sweeper.measurement import Measurement, summary
from sweeper.settings import Owner
from sweeper.store import Control, Outcome, StoredStudy, held, queue, recovery
from sweeper.store import attributes as attr
from sweeper.store.glance import best_value
from sweeper.store.view import best_of, better
from sweeper.worker.cohorts import out_of_memory
from sweeper.worker.compiling import going_by
from sweeper.worker.patience import GIVE_UP_S, patiently
from sweeper.worker.reports import Reports
from sweeper.worker.tracked import TrackedRun

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    from sweeper.training import Training, Trial
    from sweeper.worker.loop import Worker

_log = logging.getLogger(__name__)
_NAMED: Final = 20

T = TypeVar("T")


@dataclass(kw_only=True)
class Attempt:
    """One claimed trial on its way through training, store and tracker.

    Alone it is :meth:`run`. Where many train at once, whoever steps them calls :meth:`announce`,
    :meth:`begin`, :meth:`record`, :meth:`told` and :meth:`measured` after every epoch, each for all
    of them before the next, and :meth:`end`.
    ``mates`` and ``beside`` are the numbers of trials that trained in one batch with it, and in
    lanes of their own.
    """

    worker: Worker
    study: StoredStudy
    claimed: queue.Claim
    cohort: str | None = None
    alone_because: str | None = None
    mates: set[int] = field(default_factory=set)
    beside: set[int] = field(default_factory=set)
    config: TrialConfig | None = None
    background: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    epochs: list[Epoch] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    spent_s: float = 0.0
    tracked: TrackedRun = field(init=False)
    reports: Reports | None = None
    checkpoints: TrialCheckpoints | None = None

    def __post_init__(self) -> None:
        self.tracked = TrackedRun(
            tracker=self.worker.tracker,
            study=self.study.name,
            claimed=self.claimed,
            worker=self.worker.name,
        )

    @cached_property
    def owner(self) -> Owner:
        """The study that its run and its checkpoints belong to."""
        return self._patiently(lambda: held.owner_of(self.study, self.claimed), "read the study")

    @property
    def by(self) -> tuple[str, bool]:
        """The metric that decides which epoch is the best, and whether more of it is better."""
        first = self.study.spec.objective[0]
        if first.metric.startswith("val_"):
            return first.metric, first.maximize
        return "val_accuracy", True

    def configured(self) -> TrialConfig:
        """The trial's configuration; the sampler draws what it is to decide, once.

        Raises pydantic's ValidationError where the values do not fit together, and UsageError where
        they name a model that must not be imported.
        """
        if self.config is None:
            spec = self.study.spec
            values = self._patiently(
                lambda: held.values_of(spec, self.study.study, self.claimed), "read the trial"
            )
            self.config = spec.trial_config(values)
        model = self.config.model
        if isinstance(model, Custom) and not self.worker.allow_imports:
            raise UsageError(f"{model.name} must not be imported: no --allow-imports")
        return self.config

    @property
    def company(self) -> str:
        """With whom the trial trained so far."""
        how = f"in one batch with {_numbers(self.mates)}" if self.mates else ""
        if self.beside:
            how += f"{' and ' if how else ''}beside {_numbers(self.beside)}"
        return how or "with nobody beside it"

    def run(self) -> None:
        """Train the trial by itself, to whatever end it finds."""
        from sweeper.training import Interrupted, prepare

        config, worker = self.configured(), self.worker
        self.announce()
        training = prepare(
            config,
            folder=worker.settings.data,
            dataset=worker.dataset_for(config),
            objective=self.by,
            compiling=going_by(worker.settings, self.study.spec),
        )
        worker.keep(config, training.dataset)
        self.begin(training)
        try:
            try:
                outcome = self._epochs(training)
            except Interrupted:
                if self.reports is not None and self.reports.lost:
                    raise TrialLostError from None
                outcome = None
            if outcome is None:
                self.give_back()
            else:
                self.end(training, outcome)
        except StoreRefusedError:
            self.save(training)  # the store's disk is full; this one may have room
            raise

    def announce(self) -> None:
        """Tell the tracker of the trial, before anything can go wrong with it."""
        self.started = time.time()
        self.tracked.start(
            self.configured(), owner=self.owner, started=self.started, cohort=self.cohort
        )

    def begin(self, training: Trial) -> None:
        """Go on from a checkpoint where there is one; from here on epochs can be measured."""
        self._describe(training)
        self.checkpoints = self._checkpoints(checkpoints.digest(training.config, self.by))
        if found := self._loaded(training, self.checkpoints):
            self._go_on(found)
        told = None if self._several else self._series
        self.reports = Reports(self.worker.reporter, self.study, self.claimed, told=told)

    def end(self, training: Trial, outcome: Outcome) -> None:
        """Tell store and tracker how the trial ended; a completed one reads the test set."""
        final: Mapping[str, float] = {}
        if outcome is Outcome.COMPLETED:
            final = training.test()
            self._save_weights(training)
        self._finish(outcome, final)

    def close(self) -> None:
        """End what works in the background for this attempt, its heartbeat last."""
        if self.reports is not None:
            self.reports.close()
        self.background.close()

    def _checkpoints(self, digest: str) -> TrialCheckpoints:
        faults = self.study.spec.faults
        return TrialCheckpoints(
            self.worker.settings.checkpoints,
            self.owner.identity,
            self.claimed.origin,
            digest=digest,
            every=faults.checkpoint_every,
            at_most_s=faults.checkpoint_s,
        )

    def _loaded(self, training: Trial, kept: TrialCheckpoints) -> Checkpoint | None:
        """The newest checkpoint that fits, which ``training`` is then in the state of, or None."""
        fresh: Mapping[str, Any] | None = None
        while found := kept.latest():
            fresh = training.state_dict() if fresh is None else fresh
            try:
                training.load_state_dict(found.training)
            except Exception as error:
                if out_of_memory(error):
                    raise
                training.load_state_dict(fresh)
                if not kept.set_aside(found, f"it does not fit: {type(error).__name__}: {error}"):
                    return None
            else:
                return found
        return None

    def _go_on(self, found: Checkpoint) -> None:
        """Continue after the last epoch of a checkpoint; store and tracker get what they lack."""
        self.epochs = list(found.epochs)
        self.spent_s = found.seconds
        last = self.epochs[-1].measurement.epoch
        _log.info("trial %d goes on after epoch %d", self.claimed.number, last)
        if not self._several:
            series = self._series
            self._patiently(
                lambda: held.report_missing(self.worker.store, self.claimed, series),
                "report earlier epochs",
            )
        for epoch in self.epochs:
            self.tracked.log(epoch)
        self.tracked.resumed(last)

    @property
    def _series(self) -> dict[int, float]:
        """The first objective after every epoch so far."""
        metric = self.study.spec.objective[0].metric
        return {e.measurement.epoch: e.measurement.metrics[metric] for e in self.epochs}

    @property
    def _several(self) -> bool:
        """Optuna takes no reports of studies with several objectives."""
        return len(self.study.spec.objective) > 1

    def _epochs(self, training: Training) -> Outcome | None:
        """Train; how it ended, or None where the trial is to go back to the queue."""

        def interrupt() -> bool:
            return self.worker.out_of_time(self.study) or self._reports.lost

        with contextlib.closing(training.epochs(interrupt=interrupt)) as epochs:
            for measurement in epochs:
                self.worker.note_throughput(measurement.metrics.get("samples_per_s"))
                self.record(measurement)
                self.told(training)
                ended = self.measured(training)
                if ended is not None:
                    return ended
                if self.worker.signals.stopping:
                    self.save(training)
                    return None
        return Outcome.COMPLETED

    def record(self, measurement: Measurement) -> None:
        """Count an epoch that was trained. Whatever comes now, a checkpoint has it, and who goes on
        from there tells store and tracker."""
        self.epochs.append(Epoch(measurement=measurement, time_ms=round(time.time() * 1000)))

    def told(self, training: Trial) -> None:
        """Say what the last epoch gave, tracker first. Waits for nobody."""
        measurement = self.epochs[-1].measurement
        self.tracked.log(self.epochs[-1])
        if measurement.finite and not self._several:
            value = measurement.metrics[self.study.spec.objective[0].metric]
            self._reports.put(measurement.epoch, value, decide=not self._last(training))

    def measured(self, training: Trial) -> Outcome | None:
        """How the trial ends if what was told of was its last epoch, or the pruner says so."""
        measurement = self.epochs[-1].measurement
        if not measurement.finite:
            return Outcome.DIVERGED
        pruned = not self._several and self._reports.verdict()
        if self._last(training):
            return Outcome.COMPLETED
        if pruned:
            return Outcome.PRUNED
        if self.worker.asked is Control.CANCEL:
            return Outcome.CANCELLED
        if self._kept.due(measurement.epoch):
            self.save(training)
        return None

    def _last(self, training: Trial) -> bool:
        """Whether the last epoch that was trained is the last of all."""
        return self.epochs[-1].measurement.epoch >= training.config.train.epochs

    def save(self, training: Trial) -> None:
        """Write a checkpoint after the last finished epoch, unless that one diverged."""
        if self.epochs and not self.epochs[-1].measurement.finite:
            return
        self._kept.write(training, self.epochs, self._seconds)

    @property
    def _seconds(self) -> float:
        """Seconds of wall time that went into the trial, those before a checkpoint included."""
        return self.spent_s + time.time() - self.started

    @property
    def _reports(self) -> Reports:
        if self.reports is None:
            raise TrialLostError("nothing can be reported before training begins")
        return self.reports

    @property
    def _kept(self) -> TrialCheckpoints:
        if self.checkpoints is None:
            raise TrialLostError("nothing can be kept before training begins")
        return self.checkpoints

    def _patiently(self, call: Callable[[], T], what: str) -> T:
        faults = self.study.spec.faults
        return patiently(call, what, self.worker.signals, grace_s=faults.grace_s)

    def _describe(self, training: Trial) -> None:
        """What is known of the trial once its model and data are there."""
        if self.alone_because:
            training.notes["cohort"] = f"none: {self.alone_because}"
        facts = {attr.PARAMETERS: training.parameters}
        self._patiently(
            lambda: held.note(self.worker.store, self.claimed, facts), "describe the trial"
        )
        self.tracked.describe(training)

    def _values(self) -> list[float]:
        """The trial's objectives: each the value of its best epoch, or of the last."""
        result = []
        for objective in self.study.spec.objective:
            series = [epoch.measurement.metrics[objective.metric] for epoch in self.epochs]
            result.append(series[-1] if objective.at == "last" else best_of(objective, series))
        return result

    def _finish(self, outcome: Outcome, final: Mapping[str, float]) -> None:
        bad = outcome is Outcome.DIVERGED and self.study.spec.faults.on_divergence == "pruned"
        finite = [epoch.measurement for epoch in self.epochs if epoch.measurement.finite]
        metrics = {**summary(finite), **final}
        self._settle()
        self._patiently(
            lambda: held.finish(
                self.worker.store,
                self.study.study,
                self.claimed,
                outcome=outcome,
                ends_as="pruned" if bad else None,
                values=self._values() if outcome is Outcome.COMPLETED else (),
                facts={attr.METRICS: metrics, attr.SECONDS: self._seconds},
            ),
            "end the trial",
        )
        well = bad or outcome in {Outcome.COMPLETED, Outcome.PRUNED}
        company = self.company if self.mates or self.beside else None
        self.tracked.end("FINISHED" if well else "FAILED", outcome, metrics, company=company)
        self._kept.delete()
        _log.info("trial %d %s after %d epochs", self.claimed.number, outcome, len(self.epochs))

    def _settle(self) -> None:
        """Wait until the store has every report, or let it be: the last ones are worth no trial."""
        until = time.monotonic() + GIVE_UP_S
        signals, grace_s = self.worker.signals, self.study.spec.faults.grace_s
        while time.monotonic() < until and not self._reports.settle(1.0):
            if signals.stopping and signals.waited_s() >= grace_s:
                return

    def _save_weights(self, training: Trial) -> None:
        """Hand the weights to the tracker if no trial so far was better."""
        objective = self.study.spec.objective[0]
        best = self._patiently(
            lambda: best_value(self.worker.store, self.study), "compare with other trials"
        )
        if best is not None and not better(objective, self._values()[0], best):
            return
        if weights := training.best_weights():
            self.tracked.weights(weights)

    def give_back(self, *, alone: bool = False) -> None:
        """Put the trial back for another worker; nothing of it is lost but the time.

        With ``alone`` it is not to join a cohort again.

        Where the store cannot be told in time, the trial counts as lost a little later.
        """
        _log.info("trial %d goes back to the queue", self.claimed.number)
        try:
            if self.checkpoints is not None:
                self.checkpoints.wait(self.study.spec.faults.grace_s)
            if alone:
                self._patiently(
                    lambda: held.note(self.worker.store, self.claimed, {attr.ALONE: True}),
                    "put the trial back",
                )
            self._patiently(
                lambda: held.put_back(self.worker.store, self.claimed), "put the trial back"
            )
            self.tracked.end("KILLED", Outcome.PREEMPTED)
        except TrialLostError:
            pass
        except StoreUnreachableError as error:
            _log.warning("the store does not know that the trial was given back: %s", error)

    def fail(self, outcome: Outcome, error: str) -> None:
        """End the trial as failed, with the reason."""
        _log.error("trial %d %s: %s", self.claimed.number, outcome, error)
        facts = {attr.ERROR: error, attr.SECONDS: self._seconds}
        with contextlib.suppress(TrialLostError):
            self._patiently(
                lambda: held.finish(
                    self.worker.store,
                    self.study.study,
                    self.claimed,
                    outcome=outcome,
                    facts=facts,
                ),
                "end the trial",
            )
            self.tracked.end("FAILED", outcome)
            retried = recovery.tries(self.study.spec, outcome) > self.claimed.failures(outcome)
            if self.checkpoints is not None and not retried:
                self.checkpoints.delete()


def _numbers(trials: set[int]) -> str:
    """At most so many that a tag stays readable."""
    first = ", ".join(map(str, sorted(trials)[:_NAMED]))
    more = f" and {len(trials) - _NAMED} more" if len(trials) > _NAMED else ""
    return f"trial{'s' if len(trials) > 1 else ''} {first}{more}"

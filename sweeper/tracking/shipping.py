"""From journal to server: repeat the calls of records, such that repeating them again is harmless.

What makes it so: times come from the records; a run is looked for by its key before it is created;
MLflow stores equal points once; and of two attempts at one key, an older one that arrives later
changes neither status nor existing tags (the tag ``sweeper.started`` says when the latest began),
and leaves to the one that is still running the epochs that this has yet to measure.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sweeper.errors import TrackerRefusedError, TrackerUnreachableError
from sweeper.private import private_opener
from sweeper.settings import (
    ATTEMPT_TAG,
    CLOCKS_MS,
    RUN_KEY_TAG,
    STARTED_TAG,
    STUDY_ID_TAG,
    TRIAL_TAG,
    Owner,
)
from sweeper.tracking import mlflow
from sweeper.tracking.batch import Batch, Point, batches, halves
from sweeper.tracking.journal import lock
from sweeper.tracking.mlflow import ServerFailedError
from sweeper.tracking.records import Kind, Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)
PATIENCE: Final = 10
"""How often a server that is well otherwise may fail at the same records before they count as
refused."""

_AWAY_S: Final = 20.0
"""Who has sent nothing for so long looks again what the server has of a run."""

RunIdCallback = Callable[[str, str], None]
"""Called with a run's key and id as soon as the server has named it."""

_Place = tuple[str, str, str]  # experiment's name, run's key, study's identity


@dataclass(kw_only=True, slots=True)
class _Run:
    """A run as the server has it. ``running``: an attempt of it was when the server was asked.
    ``steps``: the steps it has of each metric, as far as known; None for a run that this process
    created: older attempts leave to it what it has not measured."""

    run_id: str
    started_ms: int
    running: bool
    steps: dict[str, set[int]] | None
    pending: Batch = field(default_factory=Batch)
    replaced: dict[int, bool] = field(default_factory=dict)
    """Of attempts, by when they began: whether the run has had a later one, by their numbers."""

    def is_replaced(self, started_ms: int) -> bool:
        """Whether a later attempt has taken the place of the one that began then.

        Where its numbers are not known, only if it began so much earlier that no clock is wrong.
        """
        return self.replaced.get(started_ms, started_ms < self.started_ms - CLOCKS_MS)


class Shipper:
    """Sends records to one server. Not safe for several threads."""

    def __init__(
        self,
        tracking_uri: str,
        spool: Path,
        *,
        set_aside: Callable[[Mapping[str, Any]], None],
        on_run_id: RunIdCallback | None = None,
    ) -> None:
        self._tracking_uri = tracking_uri
        self._spool = spool
        self._set_aside = set_aside
        self._on_run_id = on_run_id
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}
        self._runs: dict[_Place, _Run] = {}
        self._dirty: set[_Place] = set()
        self._failures = 0
        self._warned: set[str] = set()
        self._shipped_at = time.time()
        self.rejected = 0

    def ship(self, records: Sequence[Record]) -> list[Path]:
        """Send all records, or raise TrackerUnreachableError; then send them again later.

        What the server refuses for good is set aside, and does not stop the rest. Returns the
        artifact files that have arrived and are not needed any more.
        """
        arrived: list[Path] = []
        if time.time() - self._shipped_at > _AWAY_S:
            self._runs.clear()  # other workers may have gone on with them meanwhile
        try:
            for record in records:
                with self._refusals(record):
                    self._send(record, arrived)
            for place in self._runs.keys() & self._dirty:
                self._flush(place)
            self._dirty.clear()
        except Exception:
            self._dirty.clear()  # the records come again, and what was gathered with them
            self._runs.clear()
            raise
        self._failures = 0
        self._shipped_at = time.time()
        return arrived

    def _send(self, record: Record, arrived: list[Path]) -> None:
        place = (record.experiment, record.key, record.study_id)
        run = self._start(place, record) if record.kind is Kind.START else self._run(place)
        self._gather(place, run, record)
        if record.kind is Kind.FILE:
            file = self._spool / record.data["file"]
            with self._content(record.experiment):
                mlflow.log_artifact(self.client, run.run_id, file, record.data["folder"])
            arrived.append(file)
        if record.kind is Kind.END:
            self._flush(place)
            if record.started_ms >= run.started_ms:
                with self._content(record.experiment):
                    mlflow.set_status(
                        self.client, run.run_id, record.data["status"], end_time_ms=record.time_ms
                    )
            del self._runs[place]

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            self._client = mlflow.connect(self._tracking_uri)
        return self._client

    def _experiment(self, name: str) -> str:
        if name not in self._experiments:
            self._experiments[name] = mlflow.experiment_id(self.client, name)
        return self._experiments[name]

    def _run(self, place: _Place) -> _Run:
        """The run of a record that does not start it."""
        if place in self._runs:
            return self._runs[place]
        experiment, key, study_id = place
        owner = Owner(identity=study_id)
        found = mlflow.find_run(self.client, self._experiment(experiment), key, owner)
        if found is None:
            raise TrackerRefusedError(
                f"the experiment {experiment!r} must have a run {key}, but it has none (deleted?)"
            )
        return self._remember(place, found)

    def _remember(self, place: _Place, found: Run) -> _Run:
        before = self._runs.get(place)
        started = found.data.tags.get(STARTED_TAG, "0")
        run = self._runs[place] = _Run(
            run_id=str(found.info.run_id),
            started_ms=int(started) if started.isdigit() else 0,
            running=found.info.status == "RUNNING",
            steps={},
            replaced={} if before is None else before.replaced,
        )
        return run

    def _start(self, place: _Place, record: Record) -> _Run:
        if place in self._runs:
            self._flush(place)
        try:
            run = self._found_or_created(place, record)
        except TrackerRefusedError:  # its experiment may have been deleted meanwhile
            self._experiments.pop(record.experiment, None)
            run = self._found_or_created(place, record)
        if self._on_run_id is not None:
            try:
                self._on_run_id(record.key, run.run_id)
            except Exception as error:  # noqa: BLE001 - the caller's code must not stop the spool
                _log.warning("the run id of %s could not be passed on: %s", record.key, error)
        return run

    def _found_or_created(self, place: _Place, record: Record) -> _Run:
        experiment = self._experiment(record.experiment)
        with _one_at_a_time(self._spool):
            owner = Owner(
                identity=record.study_id,
                since_ms=record.data.get("since_ms", math.inf),
                run_ids=frozenset(record.data.get("run_ids", ())),
            )
            found = mlflow.find_run(self.client, experiment, record.key, owner)
            if found is None:
                run = self._runs[place] = self._create(experiment, record)
            else:
                run = self._remember(place, found)
                this, latest = _attempt(record.data.get("tags", {})), _attempt(found.data.tags)
                if this and latest:
                    run.replaced[record.started_ms] = this < latest
                if record.study_id:  # an older version began it
                    run.pending.tags[STUDY_ID_TAG] = record.study_id
                if record.started_ms > run.started_ms:
                    mlflow.set_status(self.client, run.run_id, "RUNNING")
                    run.started_ms = record.started_ms
                    run.pending.tags[STARTED_TAG] = str(record.started_ms)
        return run

    def _create(self, experiment: str, record: Record) -> _Run:
        """A new run, with nothing that the server may refuse: all the rest depends on it."""
        run_id = mlflow.create_run(
            self.client,
            experiment,
            name=record.data["name"],
            start_time_ms=record.time_ms,
            tags={
                RUN_KEY_TAG: record.key,
                STARTED_TAG: str(record.started_ms),
                **({STUDY_ID_TAG: record.study_id} if record.study_id else {}),
            },
        )
        return _Run(run_id=run_id, started_ms=record.started_ms, running=True, steps=None)

    def _gather(self, place: _Place, run: _Run, record: Record) -> None:
        """Put a record's metrics, parameters and tags to what is sent with the next batch."""
        data = record.data
        self._dirty.add(place)
        tags = data.get("tags", {})
        late = record.started_ms < run.started_ms
        if tags and late:
            present = mlflow.get_run(self.client, run.run_id).data.tags
            tags = {name: value for name, value in tags.items() if name not in present}
        run.pending.tags.update(tags)
        for name, value in data.get("params", {}).items():
            if run.pending.params.setdefault(name, value) != value:  # for the server to refuse
                self._flush(place)
                run.pending.params[name] = value
        step = data.get("step", 0)
        for name, value in data.get("metrics", {}).items():
            gaps_only = run.running and run.is_replaced(record.started_ms)
            if record.kind is Kind.END or self._is_new(run, name, step, gaps_only=gaps_only):
                run.pending.metrics.append(
                    Point(name=name, value=value, time_ms=record.time_ms, step=step)
                )
        if data.get("dataset"):
            alone = replace(record, kind=Kind.NOTE, data={"dataset": data["dataset"]})
            with self._refusals(alone), self._content(record.experiment):
                mlflow.log_dataset(self.client, run.run_id, data["dataset"])

    def _is_new(self, run: _Run, metric: str, step: int, *, gaps_only: bool) -> bool:
        """Whether a run that others wrote to lacks this point; from now on it has it.

        ``gaps_only``: a point after the last one is to come from the attempt that is running.
        """
        if run.steps is None:
            return True
        if metric not in run.steps:
            run.steps[metric] = mlflow.steps_of(self.client, run.run_id, metric)
        if gaps_only and step > max(run.steps[metric], default=-1):
            return False
        new = step not in run.steps[metric]
        run.steps[metric].add(step)
        return new

    def _flush(self, place: _Place) -> None:
        run = self._runs[place]
        pending, run.pending = run.pending, Batch()
        for batch in batches(pending.metrics, pending.params, pending.tags):
            try:
                self._log(place, run, batch)
            except TrackerRefusedError as error:
                if len(batch) > 1 and self._is_active(run):
                    self._search(place, run, batch)
                else:
                    self._reject_batch(place, run, batch, error)

    def _is_active(self, run: _Run) -> bool:
        """False for a run that people deleted meanwhile: it takes nothing any more."""
        try:
            return bool(mlflow.get_run(self.client, run.run_id).info.lifecycle_stage == "active")
        except TrackerRefusedError:
            return False

    def _search(self, place: _Place, run: _Run, batch: Batch) -> None:
        """Send a refused batch in ever smaller parts, until the refused entry is alone."""
        for half in halves(batch):
            try:
                self._log(place, run, half)
            except TrackerRefusedError as error:
                if len(half) > 1:
                    self._search(place, run, half)
                else:
                    self._reject_batch(place, run, half, error)

    def _log(self, place: _Place, run: _Run, batch: Batch) -> None:
        with self._content(place[0]):
            mlflow.log_batch(self.client, run.run_id, batch)

    @contextlib.contextmanager
    def _content(self, experiment: str) -> Iterator[None]:
        """A call whose content the server may fail at, each time: then it counts as refused, or it
        would block. A server that fails at everything is waited for."""
        try:
            yield
        except ServerFailedError as error:
            self._failures = self._failures + 1 if self._is_well(experiment) else 0
            if self._failures <= PATIENCE:
                raise
            raise TrackerRefusedError(str(error)) from error

    def _is_well(self, experiment: str) -> bool:
        """Whether the server takes and gives what nobody can have spoilt."""
        try:
            mlflow.write_and_read(self.client, self._experiment(experiment))
        except (TrackerUnreachableError, TrackerRefusedError):
            return False
        return True

    @contextlib.contextmanager
    def _refusals(self, record: Record) -> Iterator[None]:
        try:
            yield
        except TrackerRefusedError as error:
            self._reject(record.key, record.as_dict(), error)

    def _reject_batch(
        self, place: _Place, run: _Run, batch: Batch, error: TrackerRefusedError
    ) -> None:
        experiment, key, study_id = place
        what = {"experiment": experiment, "key": key, "study_id": study_id}
        self._reject(key, {**what, "started_ms": run.started_ms, **batch.as_dict()}, error)

    def _reject(self, key: str, what: Mapping[str, Any], error: TrackerRefusedError) -> None:
        self.rejected += 1
        self._set_aside({"reason": str(error), **what})
        level = logging.DEBUG if key in self._warned else logging.WARNING
        self._warned.add(key)
        _log.log(level, "MLflow refuses a part of the run %s, it is set aside: %s", key, error)


def _attempt(tags: Mapping[str, str]) -> tuple[int, int] | None:
    """Which attempt of a trial wrote these tags: later ones are greater, whatever clocks say."""
    numbers = (tags.get(TRIAL_TAG, ""), tags.get(ATTEMPT_TAG, ""))
    return (int(numbers[0]), int(numbers[1])) if all(map(str.isdecimal, numbers)) else None


@contextlib.contextmanager
def _one_at_a_time(spool: Path) -> Iterator[None]:
    """Only one process of this machine looks for a run and creates it at a time."""
    with open(spool / "create.lock", "w", opener=private_opener) as file:
        lock(file.fileno())
        yield

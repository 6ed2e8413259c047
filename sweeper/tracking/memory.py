"""A tracker that keeps everything in this process: for tests of whatever uses a tracker."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeper.settings import NONFINITE_TAG
from sweeper.tracking.protocol import STATUSES, Nonfinite, RunStart, plain, text


@dataclass(kw_only=True)
class MemoryRun:
    """A run as a server would show it. ``metrics``: name → step → (value, time in milliseconds);
    ``files``: path among the artifacts → content."""

    experiment: str
    name: str
    start_time_ms: int
    status: str = "RUNNING"
    end_time_ms: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[int, tuple[float, int]]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    datasets: list[Mapping[str, Any]] = field(default_factory=list)
    nonfinite: Nonfinite = field(default_factory=Nonfinite)
    step: int = 0


class MemoryTracker:
    """A :class:`~sweeper.tracking.protocol.Tracker` whose ``runs`` can be looked at, by key."""

    def __init__(self) -> None:
        self.runs: dict[str, MemoryRun] = {}
        self._lock = threading.Lock()

    def start(self, run: RunStart) -> None:
        with self._lock:
            known = self.runs.setdefault(
                run.key,
                MemoryRun(
                    experiment=run.experiment, name=run.name, start_time_ms=run.start_time_ms
                ),
            )
            known.status = "RUNNING"
            known.step = 0
            known.nonfinite = Nonfinite()
            self._describe(known, run.tags, run.params, run.dataset)

    def log(self, key: str, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        with self._lock:
            run = self._run(key)
            run.step = step
            self._measure(run, metrics, step, timestamp_ms)

    def note(
        self,
        key: str,
        *,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        dataset: Mapping[str, Any] | None = None,
    ) -> None:
        with self._lock:
            run = self._run(key)
            self._describe(run, tags or {}, params or {}, dataset)
            self._measure(run, metrics or {}, 0, run.start_time_ms)

    def artifact(self, key: str, file: Path, folder: str = "") -> None:
        with self._lock:
            path = f"{folder}/{file.name}" if folder else file.name
            self._run(key).files[path] = file.read_bytes()

    def end(
        self,
        key: str,
        *,
        status: str,
        end_time_ms: int,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, but got {status!r}")
        with self._lock:
            run = self._run(key)
            self._measure(run, metrics or {}, run.step, end_time_ms)
            self._describe(run, tags or {}, {}, None)
            run.status, run.end_time_ms = status, end_time_ms

    def flush(self, timeout_s: float) -> int:
        """Nothing is ever on its way."""
        return 0

    def _run(self, key: str) -> MemoryRun:
        if key not in self.runs:
            raise ValueError(f"the run {key!r} must be started before anything is said of it")
        return self.runs[key]

    @staticmethod
    def _measure(run: MemoryRun, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
        values, odd = plain(metrics)
        for name, value in values.items():
            run.metrics.setdefault(name, {}).setdefault(step, (value, time_ms))
        if told := run.nonfinite.tag(odd, step):
            run.tags[NONFINITE_TAG] = told

    @staticmethod
    def _describe(
        run: MemoryRun,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        dataset: Mapping[str, Any] | None,
    ) -> None:
        run.tags.update(tags)
        for name, value in params.items():
            run.params.setdefault(name, text(value))
        if dataset is not None and dataset not in run.datasets:
            run.datasets.append(dataset)

"""What a controller knows of its store, for those who ask over HTTP.

The controller writes it, requests read it: no request waits for the database, and a store that is
away shows as one that has not answered for a while. Whether the controller itself goes on is
another question: it waits for its store, and whoever starts it again in an outage mends nothing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sweeper.store import Control
from sweeper.store.overview import Tally
from sweeper.store.workers import WorkerRow

ANSWER_S: Final = 30.0
"""A store that has not answered for so long is out of reach."""
TURN_S: Final = 300.0
"""A loop that has not come round for so long is stuck: a store that is away lets go sooner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The store at one moment. ``spool_bytes`` is what this machine's MLflow still lacks."""

    tallies: tuple[Tally, ...] = ()
    workers: tuple[WorkerRow, ...] = ()
    spool_bytes: int = 0
    spool_files: int = 0


@dataclass(kw_only=True)
class Board:
    """The last snapshot, when it was taken, and what went wrong since. Safe for several threads."""

    _snapshot: Snapshot = field(default_factory=Snapshot)
    _answered: float | None = None
    _problem: str = "the store has not answered yet"
    _turned: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def show(self, snapshot: Snapshot) -> None:
        """The store has answered with this."""
        with self._lock:
            self._snapshot, self._answered, self._problem = snapshot, time.monotonic(), ""

    def turn(self) -> None:
        """The controller's loop has come round, whatever it found."""
        with self._lock:
            self._turned = time.monotonic()

    def complain(self, problem: str) -> None:
        """The store has not answered."""
        with self._lock:
            self._problem = problem

    @property
    def snapshot(self) -> Snapshot:
        with self._lock:
            return self._snapshot

    @property
    def silent_s(self) -> float | None:
        """Seconds since the store answered; None before the first time."""
        with self._lock:
            return None if self._answered is None else time.monotonic() - self._answered

    @property
    def trouble(self) -> str:
        """Why the controller cannot do its work; empty where it can."""
        silent_s = self.silent_s
        if silent_s is not None and silent_s < ANSWER_S:
            return ""
        since = "" if silent_s is None else f"the store has been silent for {silent_s:.0f} s: "
        return since + (self._problem or "the controller is stuck")

    @property
    def stuck(self) -> str:
        """Why the controller should be started again; empty where it goes on, or waits."""
        with self._lock:
            still_s = time.monotonic() - self._turned
        return "" if still_s < TURN_S else f"the controller has been stuck for {still_s:.0f} s"


class StoreCollector(Collector):
    """The board as Prometheus metrics."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        """Every metric, with the figures of the last snapshot."""
        shown = self._board.snapshot
        yield from _trials(shown.tallies)
        alive = [row.presence for row in shown.workers if row.alive]
        by_launcher = GaugeMetricFamily(
            "sweeper_workers", "Workers with a recent heartbeat.", labels=["launcher"]
        )
        for launcher, count in sorted(Counter(each.launcher for each in alive).items()):
            by_launcher.add_metric([launcher], count)
        yield by_launcher
        yield _gauge("sweeper_workers_busy", "Those with a trial.", sum(map(_busy, alive)))
        samples = sum(each.samples_per_s or 0.0 for each in alive)
        yield _gauge("sweeper_samples_per_second", "Training samples of all workers.", samples)
        yield _gauge("sweeper_spool_bytes", "Not yet in MLflow, on this host.", shown.spool_bytes)
        yield _gauge("sweeper_spool_files", "Journals of that.", shown.spool_files)
        yield _gauge("sweeper_store_up", "Whether the store answers.", not self._board.trouble)
        silent_s = self._board.silent_s
        if silent_s is not None:
            yield _gauge("sweeper_store_silent_seconds", "Since the store answered.", silent_s)


def registry(board: Board) -> CollectorRegistry:
    """A registry of its own with nothing but the board."""
    found = CollectorRegistry(auto_describe=False)
    found.register(StoreCollector(board))
    return found


def _trials(tallies: tuple[Tally, ...]) -> Iterator[Metric]:
    trials = GaugeMetricFamily(
        "sweeper_trials", "Trials by study and state.", labels=["study", "state"]
    )
    budget = GaugeMetricFamily("sweeper_budget_trials", "Trials to be ended.", labels=["study"])
    for tally in tallies:
        for state, count in tally.counts.items():
            trials.add_metric([tally.name, state], count)
        budget.add_metric([tally.name], tally.budget)
    yield trials
    yield budget
    waiting = sum(tally.counts["waiting"] for tally in tallies if tally.control is Control.RUN)
    yield _gauge("sweeper_queue_length", "Trials that a free worker would take.", waiting)


def _busy(presence: object) -> bool:
    return bool(getattr(presence, "trials", ()))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))

"""The progress of a sweep on stderr: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeper.cli.printing import STATE_STYLE, duration, err, number, redraws, text
from sweeper.settings import masked
from sweeper.store import Progress, TrialRow
from sweeper.store.view import STATES

_RUNNING_SHOWN = 16
_PLAIN_EVERY_S = 30.0


class View(Protocol):
    """Shows how a sweep stands, as often as it is told."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_error: object) -> None: ...

    def show(self, now: Progress, workers: int, note: str = "") -> None:
        """Show ``now``; ``note`` is a line for the person who waits."""


def view(tracking: Callable[[], str | None]) -> View:
    """The view for this stderr; ``tracking`` tells the MLflow server's address."""
    console = err()
    return _LiveView(console, tracking) if redraws(console) else _PlainView(console)


def left_s(now: Progress, workers: int) -> float | None:
    """Seconds until the sweep is over, from the mean of the trials that ended; None before."""
    if now.mean_seconds is None or not workers:
        return None
    return now.mean_seconds * (now.budget - now.ended) / min(workers, now.budget)


class _LiveView:
    def __init__(self, console: Console, tracking: Callable[[], str | None]) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=False)
        self._tracking = tracking
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()

    def show(self, now: Progress, workers: int, note: str = "") -> None:
        self._live.update(self._render(now, workers, note))

    def _render(self, now: Progress, workers: int, note: str) -> Group:
        counts = now.counts
        head = Text.assemble(
            (now.spec.name, "bold"), f"  {now.ended}/{now.budget} trials, {workers} workers"
        )
        states = Text("  ").join(
            Text(f"{counts[state]} {state}", style=STATE_STYLE[state]) for state in STATES
        )
        times = f"{duration(time.monotonic() - self._began)} gone"
        if not now.over:
            times += f", about {duration(left_s(now, workers))} left"
        parts: list[RenderableType] = [
            head,
            _bar(now),
            states,
            Text(f"{times}   MLflow: {self._where}", style="dim"),
        ]
        if now.best is not None:
            parts.append(Text.from_markup(_best(now)))
        if now.counts["running"]:
            parts.append(_running(now))
        if note:
            parts.append(Text(note, style="yellow"))
        return Group(*parts)

    @property
    def _where(self) -> str:
        address = self._tracking()
        return masked(address) if address else "starting"


def _bar(now: Progress) -> Table:
    """A progress bar on a line of its own, which a bare one is not."""
    grid = Table.grid()
    grid.add_row(ProgressBar(total=max(1, now.budget), completed=now.ended, width=60))
    return grid


def _best(now: Progress) -> str:
    row = now.best
    if row is None:
        return ""
    chosen = ", ".join(f"{text(path)}={text(value)}" for path, value in row.params.items())
    metric = now.spec.objective[0].metric
    return f"best [bold green]{number(row.values[0])}[/] {metric} (#{row.number}: {chosen})"


def _running(now: Progress) -> Table:
    metric = now.spec.objective[0].metric
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("running", "epoch", metric, "worker"):
        table.add_column(column)
    for row in now.running[:_RUNNING_SHOWN]:
        table.add_row(
            f"#{row.number}", str(row.epoch or 0), number(row.last_value), text(row.worker or "")
        )
    if len(now.running) > _RUNNING_SHOWN:
        table.add_row(f"… and {len(now.running) - _RUNNING_SHOWN} more")
    return table


class _PlainView:
    """A line for every trial that ended, and one now and then for those that run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[int] = set()
        self._last = time.monotonic()
        self._note = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        return None

    def show(self, now: Progress, workers: int, note: str = "") -> None:
        for row in now.news:  # shown again while the store is away
            if row.number not in self._told:
                self._told.add(row.number)
                self._say(_ended_line(now, row))
        if note and note != self._note:
            self._note = note
            self._say(note)
        if time.monotonic() - self._last > _PLAIN_EVERY_S:
            counts = now.counts
            self._say(
                f"{now.ended}/{now.budget} trials, {counts['running']} running, "
                f"about {duration(left_s(now, workers))} left"
            )

    def _say(self, line: str) -> None:
        self._last = time.monotonic()
        self._console.print(line, markup=False)


def _ended_line(now: Progress, row: TrialRow) -> str:
    metric = now.spec.objective[0].metric
    value = row.values[0] if row.values else row.last_value
    state = row.outcome or row.state
    line = f"trial {row.number}: {state}"
    if row.state in {"retried", "waiting"}:
        return f"{line}; it is tried again"
    if value is not None:
        line += f", {metric} {number(value)}"
    if row.error:
        line += ": " + row.error.strip().splitlines()[-1]
    return f"{line} ({now.ended}/{now.budget}, {duration(row.seconds)})"

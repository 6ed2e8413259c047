"""How values are shown to people, and JSON to programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from sweeper.cli.plain import plain
from sweeper.report.wording import value as worded
from sweeper.store import TrialRow
from sweeper.study.spec import StudySpec

_ENDLESS: Final = 4000

STATE_STYLE: Final = {
    "complete": "green",
    "pruned": "yellow",
    "failed": "red",
    "running": "cyan",
    "waiting": "dim",
    "retried": "dim",
}


def out() -> Console:
    """Where results go. A file or a pipe gets lines as long as they are."""
    return _console(sys.stdout)


def err() -> Console:
    """Where everything else goes."""
    return _console(sys.stderr)


class PlainConsole(Console):
    """Colours and moves the cursor itself; no text that it is given can."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(plain(text), style)


def _console(stream: TextIO) -> Console:
    if stream.isatty():
        return PlainConsole(file=stream, highlight=False)
    return PlainConsole(file=stream, highlight=False, width=_ENDLESS, soft_wrap=True)


def redraws(console: Console) -> bool:
    """Whether what was printed can be drawn over: colours that are asked for make no terminal."""
    return console.file.isatty() and not console.is_dumb_terminal


def print_json(value: Any) -> None:
    """``value`` as JSON on stdout. NaN and infinity, which JSON does not know, become null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def number(value: float | None) -> str:
    """A metric with four digits that count."""
    if value is None:
        return "–"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.3g}"
    return f"{value:.4f}"


def text(value: Any) -> str:
    """A parameter's value as the report words it, safe to print."""
    return escape(worded(value))


def duration(seconds: float | None) -> str:
    """Seconds as people read them: ``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def varied(spec: StudySpec, rows: Sequence[TrialRow]) -> list[str]:
    """The parameters worth a column: those of the space, then others that some trial sets."""
    extra = sorted({path for row in rows for path in row.params} - set(spec.parameters))
    return [*spec.parameters, *extra]


def headings(paths: Sequence[str]) -> dict[str, str]:
    """A short heading for every dotted path: its last word, the section's for a name.

    >>> headings(["optimizer.name", "optimizer.lr", "model.name"])
    {'optimizer.name': 'optimizer', 'optimizer.lr': 'lr', 'model.name': 'model'}
    """
    short = {path: path.removesuffix(".name").rpartition(".")[2] for path in paths}
    used = list(short.values())
    return {path: word if used.count(word) == 1 else path for path, word in short.items()}


def trial_table(spec: StudySpec, rows: Sequence[TrialRow], title: str) -> Table:
    """Trials with their parameters and what they reached."""
    metric = spec.objective[0].metric
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("state")
    table.add_column(metric, justify="right")
    table.add_column("test accuracy", justify="right")
    paths = varied(spec, rows)
    for heading in headings(paths).values():
        table.add_column(escape(heading), justify="right")
    table.add_column("time", justify="right")
    for row in rows:
        value = row.values[0] if row.values else row.last_value
        named = row.outcome and row.outcome not in {"completed", row.state}
        state = f"{row.state} ({row.outcome})" if named else row.state
        table.add_row(
            str(row.number),
            f"[{STATE_STYLE[row.state]}]{state}[/]",
            number(value),
            number(row.metrics.get("test_accuracy")),
            *(escape(worded(row.params[path])) if path in row.params else "" for path in paths),
            duration(row.seconds),
        )
    return table

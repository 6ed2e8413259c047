"""A study's trials as rows for a file: one column a parameter, one a metric."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from sweeper.store import Standing, TrialRow


def columns(now: Standing) -> tuple[list[str], list[str]]:
    """The parameters and the metrics that any trial has."""
    paths = list(now.spec.parameters)
    paths += sorted({path for row in now.rows for path in row.params} - set(paths))
    metrics = sorted({name for row in now.rows for name in row.metrics})
    return paths, metrics


def trials_csv(now: Standing) -> str:
    """Every trial, the best first, those without a result last."""
    paths, metrics = columns(now)
    ranked = now.leaderboard
    rows = [*ranked, *(row for row in now.rows if row not in ranked)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    objectives = [f"objective.{objective.metric}" for objective in now.spec.objective]
    writer.writerow(
        ["number", "state", "outcome", *objectives, *paths, *metrics, "seconds", "attempt"]
    )
    for row in rows:
        writer.writerow(_cells(row, len(objectives), paths, metrics))
    return stream.getvalue()


def _cells(row: TrialRow, objectives: int, paths: list[str], metrics: list[str]) -> list[Any]:
    values = list(row.values) + [""] * (objectives - len(row.values))
    return [
        row.number,
        row.state,
        row.outcome or "",
        *values,
        *(_cell(row.params[path]) if path in row.params else "" for path in paths),
        *(row.metrics.get(name, "") for name in metrics),
        row.seconds if row.seconds is not None else "",
        row.attempt,
    ]


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else json.dumps(value)

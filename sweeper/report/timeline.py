"""Who trained what, when: one lane a worker, one bar an attempt, coloured by how it ended.

Optuna's own timeline knows no workers.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from sweeper.report.blocks import Figure
from sweeper.report.collect import StudyData
from sweeper.report.drawing import LEGEND_ABOVE, STATES, layout, numbers, plain
from sweeper.report.wording import duration, metric_title, number, plural
from sweeper.store import TrialRow

_LANE_PX: Final = 34
_LEAST_PX: Final = 150
_MOST_PX: Final = 900
_NAME_LENGTH: Final = 18
_NUMBER_PX: Final = 9
_LEAST_BAR_S: Final = 0.002
"""Of the whole time, so that no attempt is invisible."""


def timeline(data: StudyData) -> Figure | None:
    """The figure, or None before any trial has started."""
    rows = [row for row in data.now.rows if row.started is not None]
    if not rows:
        return None
    starts = [row.started for row in rows if row.started is not None]
    ends = [row.ended for row in rows if row.ended is not None]
    start, end = min(starts), max([*ends, *starts])
    lanes = _lanes(sorted({row.worker or "unknown" for row in rows}))
    whole_ms = max(1.0, (end - start).total_seconds() * 1000)
    traces = []
    for state in STATES:
        bars = [row for row in rows if row.state == state]
        if bars:
            traces.append(_bars(data, state, bars, end, lanes, whole_ms * _LEAST_BAR_S))
    drawn = layout(
        x=f"time of day, {start:%-d %B %Y}",
        barmode="overlay",
        bargap=0.25,
        showlegend=True,
        legend=LEGEND_ABOVE,
        uniformtext={"mode": "hide", "minsize": _NUMBER_PX},
    )
    drawn["xaxis"] |= {
        "type": "date",
        "tickangle": 0,
        "nticks": 4,
        "tickformat": _clock(end - start),
    }
    drawn["yaxis"] |= {"type": "category", "autorange": "reversed", "title": {"text": ""}}
    return Figure(
        name="timeline",
        title="Timeline",
        caption="One lane a worker, one bar an attempt, with its trial's number.",
        spec={"data": traces, "layout": drawn},
        height_px=min(_MOST_PX, max(_LEAST_PX, 110 + _LANE_PX * len(lanes))),
        wide=True,
    )


def _clock(span: timedelta) -> str:
    """What tells the ticks of such a span apart, short enough for a phone."""
    if span < timedelta(minutes=10):
        return "%H:%M:%S"
    return "%H:%M" if span < timedelta(hours=20) else "%-d %b<br>%H:%M"


def _lanes(workers: list[str]) -> dict[str, str]:
    """A label for each worker: its name, or the end of it, or a number where ends are alike."""
    short = {
        name: name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}"
        for name in workers
    }
    if len(set(short.values())) < len(workers):
        short = {name: f"worker {index}" for index, name in enumerate(workers, start=1)}
    return {name: plain(label) for name, label in short.items()}


def _bars(
    data: StudyData,
    state: str,
    rows: list[TrialRow],
    end: datetime,
    lanes: dict[str, str],
    least_ms: float,
) -> dict[str, Any]:
    spans = [((row.ended or end) - (row.started or end)).total_seconds() * 1000 for row in rows]
    return {
        "type": "bar",
        "orientation": "h",
        "name": state,
        "base": [(row.started or end).isoformat(timespec="milliseconds") for row in rows],
        "x": numbers(max(least_ms, span) for span in spans),
        "y": [lanes[row.worker or "unknown"] for row in rows],
        "text": [str(row.number) for row in rows],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "customdata": [_said(data, row) for row in rows],
        "marker": {"color": STATES[state], "line": {"width": 0.5, "color": "rgba(0,0,0,0.35)"}},
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _said(data: StudyData, row: TrialRow) -> str:
    metric = metric_title(data.now.spec.objective[0].metric)
    reached = row.values[0] if row.values else row.last_value
    how = (row.outcome or row.state).replace("_", " ")
    lines = [f"trial {row.number}: {how} after {duration(row.seconds)}"]
    if reached is not None:
        epochs = data.epochs(row)
        after = f" after {plural(epochs, 'epoch')}" if epochs else ""
        lines.append(f"{metric} {number(reached)}{after}")
    lines.append(row.worker or "unknown worker")
    return "<br>".join(map(plain, lines))

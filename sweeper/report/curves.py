"""The reports' four figures: loss and accuracy over the epochs, in training and validation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sweeper.report.blocks import Curves, Figure, Line
from sweeper.report.collect import StudyData
from sweeper.report.configurations import Configuration, setting
from sweeper.report.drawing import OTHERS, colour, faint, layout, numbers, plain
from sweeper.report.leaderboard import described, published_name
from sweeper.report.wording import metric_title, plural
from sweeper.tracking.history import CURVES

_ALL_COLOURED: Final = 10
_HIGHLIGHTED: Final = 8
_MARKED_UP_TO: Final = 15
_STRETCH: Final = 2
"""Grey lines may make a figure of losses so much higher than its coloured ones."""
_DIVERGED: Final = 20
"""A loss so many times the highest of the better half of the lines is no measurement to compare."""
_CUT: Final = "A line that diverged leaves its figure of losses; a double click shows all of it."
_NAMED_BY_VALUES: Final = 3
_LINES_AT_MOST: Final = 200


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line, mean over the trials of a configuration. ``series``: metric → epoch → values."""

    label: str
    hint: str
    series: Mapping[str, Mapping[int, Sequence[float]]]
    highlighted: bool = True


def curves(data: StudyData) -> list[Curve]:
    """One line a configuration, those to look at first: in the order of the studied factor's
    values where there is one factor, in that of published rows where nothing else was run, else
    the best first."""
    ranked = data.ranked
    done = {config.key for config in ranked}
    rest = [config for config in data.found if config.key not in done]
    ordered = [*ranked, *sorted(rest, key=lambda config: _came(data, config))]
    lines = [config for config in ordered if _has_history(data, config)][:_LINES_AT_MOST]
    one_factor = len(data.factors) == 1
    if len(lines) <= _ALL_COLOURED:
        highlighted = {config.key for config in lines}
    else:
        highlighted = {config.key for config in lines[:_HIGHLIGHTED]}
    if any(published_name(data, config) for config in lines):
        lines.sort(key=lambda config: config.rows[0].number)
    elif one_factor:
        lines.sort(key=lambda config: _position(data, config))
    return [
        Curve(
            label=label(data, config),
            hint=described(data, config),
            series={
                metric: over_trials([data.history(row, metric) for row in config.rows])
                for metric in CURVES
            },
            highlighted=config.key in highlighted,
        )
        for config in lines
    ]


def _came(data: StudyData, config: Configuration) -> tuple[int, float]:
    """How far those without a completed trial came: furthest first, of those the best first."""
    objective = data.now.spec.objective[0]
    sign = -1.0 if objective.maximize else 1.0
    values = [
        (epoch, sign * reached)
        for row in config.rows
        for epoch, reached in data.history(row, objective.metric).items()
        if math.isfinite(reached)
    ]
    furthest = max((epoch for epoch, _ in values), default=0)
    return -furthest, min((reached for _, reached in values), default=math.inf)


def _has_history(data: StudyData, config: Configuration) -> bool:
    return any(data.history(row, metric) for row in config.rows for metric in CURVES)


def _position(data: StudyData, config: Configuration) -> tuple[int, float, int]:
    """Where the factor's value stands: numbers by size, others in the order of the file."""
    path = data.factors[0]
    found = setting(data.now.spec, config.resolved, config.params, path)
    if isinstance(found, int | float) and not isinstance(found, bool):
        return 0, float(found), 0
    return 1, 0.0, config.rows[0].number


def label(data: StudyData, config: Configuration) -> str:
    """A configuration's name in a legend: its published row's, its value of the factor, or its
    trial and values."""
    sizes = {len(each.rows) for each in data.found}
    seeds = f" ({plural(len(config.rows), 'seed')})" if len(sizes) > 1 else ""
    if name := published_name(data, config):
        return f"{name}{seeds}"
    if not data.factors:
        trials = len(config.rows)
        return f"trial {config.rows[0].number}" if trials == 1 else f"mean of {trials} trials"
    if len(data.factors) == 1:
        found = setting(data.now.spec, config.resolved, config.params, data.factors[0])
        return f"{found if isinstance(found, str) else described(data, config)}{seeds}"
    if len(data.factors) <= _NAMED_BY_VALUES:
        return f"{described(data, config)}{seeds}"
    return f"trial {config.rows[0].number}{seeds}"


def over_trials(histories: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """Epoch → the finite values of all trials that have one, in the order of the epochs."""
    found: dict[int, list[float]] = {}
    for history in histories:
        for epoch, reached in history.items():
            if math.isfinite(reached):
                found.setdefault(epoch, []).append(reached)
    return dict(sorted(found.items()))


def curves_block(lines: Sequence[Curve], name: str = "curves", caption: str = "") -> Curves | None:
    """The four figures with one legend; None where no trial has two epochs to join."""
    metrics = [
        metric for metric in CURVES if any(len(curve.series.get(metric, ())) > 1 for curve in lines)
    ]
    if not metrics:
        return None
    coloured = [curve for curve in lines if curve.highlighted]
    colours = {id(curve): colour(index) for index, curve in enumerate(coloured)}
    others = len(lines) - len(coloured)
    legend = [
        Line(
            key=f"line{index}",
            label=curve.label,
            colour=colours[id(curve)],
            dashed=index >= _ALL_COLOURED,
        )
        for index, curve in enumerate(coloured)
    ]
    if others:
        legend.append(Line(key="others", label=f"{plural(others, 'other')}", colour=OTHERS))
    keys = {id(curve): f"line{index}" for index, curve in enumerate(coloured)}
    # Grey lines first, so that those to look at lie above them.
    order = sorted(lines, key=lambda curve: curve.highlighted)
    figures = tuple(
        Figure(
            name=f"{name}-{metric.replace('_', '-')}",
            title=metric_title(metric)
            .replace("train", "training", 1)
            .replace("val ", "validation ", 1),
            caption="",
            spec=_figure(order, metric, keys, colours),
            height_px=300,
        )
        for metric in metrics
    )
    if any("range" in figure.spec["layout"]["yaxis"] for figure in figures):
        caption = f"{caption} {_CUT}".strip()
    return Curves(name=name, legend=tuple(legend), caption=caption, figures=figures)


def _figure(
    lines: Sequence[Curve], metric: str, keys: Mapping[int, str], colours: Mapping[int, str]
) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for curve in lines:
        series = curve.series.get(metric)
        if not series:
            continue
        key = keys.get(id(curve), "others")
        tint = colours.get(id(curve), OTHERS)
        if curve.highlighted and any(len(values) > 1 for values in series.values()):
            traces.append(_band(series, key, tint))
        traces.append(_line(curve, series, key, tint))
    drawn = layout(x="epoch", y=metric_title(metric))
    last = max((epoch for curve in lines for epoch in curve.series.get(metric, ())), default=0)
    if last <= _MARKED_UP_TO:
        drawn["xaxis"] |= {"dtick": 1}  # no half epochs
    if metric.endswith("loss") and (span := _span(lines, metric)):
        drawn["yaxis"] |= {"range": span}
    return {"data": traces, "layout": drawn}


def _span(lines: Sequence[Curve], metric: str) -> list[float] | None:
    """From where to where the losses to look at lie, where others would press them flat.

    Others are grey lines, and coloured ones that diverged: a studied value that merely learns
    nothing stays in the figure.
    """
    known = [curve for curve in lines if curve.series.get(metric)]
    coloured = sorted(
        (_means(curve, metric) for curve in known if curve.highlighted),
        key=min,
    )
    if not coloured:
        return None
    half = coloured[: (len(coloured) + 1) // 2]
    most = _DIVERGED * max(map(max, half))
    shown = [value for values in coloured for value in values if value <= most]
    low, high = min(shown), max(shown)
    if max(max(_means(curve, metric)) for curve in known) <= high + _STRETCH * (high - low):
        return None
    room = 0.1 * (high - low)
    return [max(low - room, 0.5 * low), high + room]


def _means(curve: Curve, metric: str) -> list[float]:
    return [statistics.fmean(values) for values in curve.series[metric].values()]


def _line(
    curve: Curve, series: Mapping[int, Sequence[float]], key: str, tint: str
) -> dict[str, Any]:
    epochs = list(series)
    said = plain(curve.label if curve.hint in curve.label else f"{curve.label}: {curve.hint}")
    dashed = key.startswith("line") and int(key[4:]) >= _ALL_COLOURED
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(epochs) <= _MARKED_UP_TO else "lines",
        "name": plain(curve.label),
        "legendgroup": key,
        "x": epochs,
        "y": numbers(statistics.fmean(values) for values in series.values()),
        "line": {
            "color": tint,
            "width": 2 if curve.highlighted else 1,
            "dash": "dash" if dashed else "solid",
        },
        "opacity": 1 if curve.highlighted else 0.45,
        "marker": {"size": 5 if curve.highlighted else 3},
        "hovertemplate": f"{said}<br>epoch %{{x}}: %{{y:.4f}}<extra></extra>",
    }


def _band(series: Mapping[int, Sequence[float]], key: str, tint: str) -> dict[str, Any]:
    """One standard deviation to either side of the mean."""
    epochs = list(series)
    means = [statistics.fmean(values) for values in series.values()]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in series.values()]
    upper = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    lower = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    return {
        "type": "scatter",
        "mode": "lines",
        "legendgroup": key,
        "x": [*epochs, *reversed(epochs)],
        "y": numbers([*upper, *reversed(lower)]),
        "fill": "toself",
        "fillcolor": faint(tint, 0.18),
        "line": {"width": 0},
        "hoverinfo": "skip",
    }

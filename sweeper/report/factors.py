"""What a choice costs and brings: parameters, seconds an epoch, accuracy (R4.4, figures 13–15)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sweeper.report.blocks import Figure
from sweeper.report.collect import StudyData
from sweeper.report.configurations import Configuration, Spread, setting
from sweeper.report.curves import label
from sweeper.report.drawing import COLOURS, LEGEND_ABOVE, layout, numbers, plain
from sweeper.report.leaderboard import described
from sweeper.report.wording import metric_title, short_names, value

_LOG_FROM: Final = 20
"""An axis whose largest value is so many times the smallest is logarithmic."""

_NEXT_TO_NOTHING: Final = 0.01
"""Costs that differ by no more than such a share are the same, as those of a normalisation are."""

_LABEL_WIDTH: Final = 16
_TICKS: Final = 12
"""So many values of the factor are written at their places; more would overlap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Series:
    metric: str
    name: str


_SIZE: Final = "model_parameters"

_FIGURES: Final = (
    ("parameters", "parameters", (_Series(metric=_SIZE, name="parameters"),)),
    (
        "seconds",
        "seconds an epoch",
        (
            _Series(metric="mean_seconds", name="training"),
            _Series(metric="mean_val_seconds", name="validation"),
        ),
    ),
    (
        "accuracy",
        "accuracy",
        (
            _Series(metric="max_train_accuracy", name="training"),
            _Series(metric="max_val_accuracy", name="validation"),
            _Series(metric="test_accuracy", name="test"),
        ),
    ),
)


def factor_figures(data: StudyData) -> list[Figure]:
    """The studied factor against size, time and accuracy.

    Without a single factor: accuracy against size and against time, one point a configuration,
    where these differ.
    """
    done = list(data.ranked)
    if len(done) < 2:
        return []
    if len(data.factors) == 1:
        return [
            figure
            for name, title, series in _FIGURES
            if (figure := _against_factor(data, done, name, title, series)) is not None
        ]
    return [
        figure
        for metric, title in ((_SIZE, "parameters"), ("mean_seconds", "seconds"))
        if (figure := _trade_off(data, done, metric, title)) is not None
    ]


def _against_factor(
    data: StudyData,
    done: Sequence[Configuration],
    name: str,
    title: str,
    series: Sequence[_Series],
) -> Figure | None:
    path = data.factors[0]
    spec = data.now.spec
    factor = short_names(data.factors)[path]
    points = [(setting(spec, config.resolved, config.params, path), config) for config in done]
    if name == "parameters" and len({size for _, c in points if (size := c.metric(_SIZE))}) < 2:
        return None
    numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x, _ in points)
    if numeric:
        points.sort(key=lambda point: float(point[0]))
    else:
        points.sort(key=lambda point: point[1].rows[0].number)
    xs = [float(x) if numeric else _folded(value(x)) for x, _ in points]
    traces = [
        _trace(each.name, xs, spreads, COLOURS[index], joined=numeric)
        for index, each in enumerate(series)
        if any(spreads := [config.metric(each.metric) for _, config in points])
    ]
    if not traces:
        return None
    drawn = layout(x=factor, y=title, showlegend=len(traces) > 1, legend=LEGEND_ABOVE)
    if numeric:
        ticks = {"tickmode": "array", "tickvals": xs, "ticktext": [value(x) for x, _ in points]}
        drawn["xaxis"] |= ticks if len(xs) <= _TICKS else {}
        if _wide_range([float(x) for x, _ in points]):
            drawn["xaxis"] |= {"type": "log"}
    else:
        drawn["xaxis"] |= {"type": "category"}
        drawn["xaxis"]["title"]["standoff"] = 12
    if title == "parameters":
        drawn["yaxis"] |= {"rangemode": "tozero"}
    return Figure(
        name=f"factor-{name}",
        title=f"{title.capitalize()} by {factor}",
        caption="",
        spec={"data": traces, "layout": drawn},
        height_px=300,
    )


def _folded(text: str) -> str:
    """A label in lines, or it would leave the figure no room."""
    return "<br>".join(plain(line) for line in textwrap.wrap(text, _LABEL_WIDTH)) or text


def _trace(
    name: str, xs: Sequence[Any], spreads: Sequence[Spread | None], tint: str, *, joined: bool
) -> dict[str, Any]:
    deviations = [spread.deviation if spread else None for spread in spreads]
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if joined else "markers",
        "name": name,
        "x": list(xs),
        "y": numbers(spread.mean if spread else None for spread in spreads),
        "line": {"color": tint, "width": 2},
        "marker": {"size": 9, "color": tint},
        "hovertemplate": f"%{{x}}: %{{y:,.5~g}} {name}<extra></extra>",
    }
    if any(deviation is not None for deviation in deviations):
        trace["error_y"] = {"type": "data", "array": numbers(deviations), "color": tint}
    return trace


def _trade_off(
    data: StudyData, done: Sequence[Configuration], metric: str, title: str
) -> Figure | None:
    """Accuracy over a cost, one point a configuration."""
    measure = "test_accuracy" if any(each.metric("test_accuracy") for each in done) else None
    objective = data.now.spec.objective[0].metric
    points = [
        (cost.mean, gain.mean, config)
        for config in done
        if (cost := config.metric(metric))
        and (gain := config.metric(measure) if measure else config.objective())
    ]
    costs = [cost for cost, _, _ in points]
    if not costs or max(costs) - min(costs) <= _NEXT_TO_NOTHING * max(costs):
        return None
    axis = "seconds an epoch, training" if title == "seconds" else title
    reached = metric_title(measure or objective)
    drawn = layout(x=axis, y=reached)
    if _wide_range(costs):
        drawn["xaxis"] |= {"type": "log"}
    return Figure(
        name=f"trade-off-{title}",
        title=f"{reached.capitalize()} and {axis}",
        caption="One point a configuration.",
        spec={
            "data": [
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": numbers(cost for cost, _, _ in points),
                    "y": numbers(gain for _, gain, _ in points),
                    "text": [
                        plain(f"{label(data, config)}: {described(data, config)}")
                        for _, _, config in points
                    ],
                    "marker": {"size": 9, "color": COLOURS[0]},
                    "hovertemplate": "%{text}<br>%{x:,.5~g}: %{y:.4f}<extra></extra>",
                }
            ],
            "layout": drawn,
        },
        height_px=300,
    )


def _wide_range(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _LOG_FROM

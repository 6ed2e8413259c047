"""Optuna's figures in this report's words and in colours that show on white and on near-black.

Optuna draws for a white page: its scale ends in white at one side and in near-black at the other,
so that the worst trial vanishes on a light page and the best one on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import plotly.colors

SCALE: Final = ((0.0, "#8796a5"), (0.5, "#3b82c4"), (1.0, "#d97706"))
"""From grey over blue to orange: all of a middling lightness, told apart by hue."""

_OPTUNAS: Final = tuple(plotly.colors.sequential.Blues)
_WORDS: Final = {
    "Best Value": "best so far",
    "Trial": "trial",
    "#Trials": "trials",
    "Cumulative Probability": "share of trials",
    "Hyperparameter": "parameter",
    "Hyperparameter Importance": "importance",
    "Importance for Objective Value": "importance",
}
_NUMBERED: Final = 20
"""So many trials on a front have their numbers beside them; more would hide each other."""

_FEW_TRIALS: Final = 12
"""Up to so many, an axis of trial numbers would have halves between them."""

_LINE: Final = {"width": 2}
_LINE_OPACITY: Final = 0.75


def restyled(name: str, spec: dict[str, Any], objective: str) -> dict[str, Any]:
    """``spec`` of Optuna's figure ``name``, changed in place."""
    _reword(spec, {**_WORDS, "Objective Value": objective})
    layout = spec["layout"]
    if name == "pareto_front":
        _front(spec["data"], layout)
    for trace in spec["data"]:
        _rescale(trace)
        _unquote(trace, "x", "y")
    for key, axis in layout.items():
        if key.startswith(("xaxis", "yaxis")):
            _unquote(axis, "categoryarray")
    for note in layout.get("annotations", ()):
        note.get("font", {}).pop("color", None)  # the page's own colour
    if name == "parallel_coordinate":
        _recolour_lines(spec["data"])
    if name == "optimization_history":
        _stairs(spec["data"])
        last = max((x for trace in spec["data"] for x in _listed(trace.get("x"))), default=0)
        if last < _FEW_TRIALS:
            layout["xaxis"] |= {"dtick": 1}
    return spec


def _front(traces: list[dict[str, Any]], layout: dict[str, Any]) -> None:
    """Trials on the front stand out, by number; Optuna tells both kinds apart by their scales."""
    layout["showlegend"] = True
    large, small, font = (11, 7, 12)
    if "scene" in layout:  # points in space are drawn larger, and text smaller
        large, small, font = (5, 3, 24)
        room = {"eye": {"x": 1.6, "y": 1.6, "z": 1.1}, "center": {"x": 0, "y": 0, "z": -0.2}}
        layout["scene"]["camera"] = room  # for the titles of the axes
    for trace in traces:
        best = trace["marker"]["colorbar"]["title"]["text"] == "Best Trial"
        numbers = _listed(trace["marker"]["color"])
        trace |= {
            "name": "on the front" if best else "others",
            "showlegend": bool(numbers),
            "marker": {"size": large, "color": SCALE[-1][1]}
            if best
            else {"size": small, "color": SCALE[0][1]},
            "hovertemplate": "%{text}<extra></extra>",
        }
        if best and len(numbers) <= _NUMBERED:
            trace |= {
                "mode": "markers+text",
                "customdata": numbers,
                "texttemplate": "%{customdata}",
                "textposition": "top center",
                "textfont": {"size": font},
            }


def _reword(item: Any, words: dict[str, str]) -> None:
    """Put other words where Optuna has its own, as whole texts."""
    places = item.items() if isinstance(item, dict) else enumerate(item)
    for place, each in list(places):
        if isinstance(each, str):
            item[place] = words.get(each, each)
        elif isinstance(each, dict | list):
            _reword(each, words)


def _unquote(item: dict[str, Any], *keys: str) -> None:
    """Categories without the quotes in which Optuna writes text."""
    for key in keys:
        if isinstance(values := item.get(key), list):
            item[key] = [_bare(each) if isinstance(each, str) else each for each in values]


def _bare(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _rescale(trace: dict[str, Any]) -> None:
    """A scale of points; that of an area, which is its own ground, stays."""
    marker = trace.get("marker")
    if not isinstance(marker, dict):
        return
    if [colour for _, colour in marker.get("colorscale") or ()] == list(_OPTUNAS):
        marker["colorscale"] = [list(stop) for stop in SCALE]
        marker |= {"line": {"width": 0}, "size": marker.get("size", 8)}
        bar = marker.get("colorbar")
        last = max(_listed(marker.get("color")), default=_FEW_TRIALS)
        if bar and bar.get("title", {}).get("text") == "trial" and last < _FEW_TRIALS:
            bar["dtick"] = 1


def _recolour_lines(traces: list[dict[str, Any]]) -> None:
    """A line a trial, by its objective, which is the first of its points, between 0 and 1."""
    reverse = any(trace.get("marker", {}).get("reversescale") for trace in traces)
    for trace in traces:
        if trace.get("mode") != "lines" or not _listed(trace.get("y")) or trace["y"][0] is None:
            continue
        place = 1 - trace["y"][0] if reverse else trace["y"][0]
        trace["line"] |= {"color": along(place), **_LINE}
        trace["opacity"] = _LINE_OPACITY


def along(place: float) -> str:
    """The colour of the scale at ``place``, which is between 0 and 1."""
    stops = [list(stop) for stop in SCALE]
    found: str = plotly.colors.sample_colorscale(stops, [min(1.0, max(0.0, place))])[0]
    return found


def _stairs(traces: list[dict[str, Any]]) -> None:
    """The best so far stays what it is until a trial beats it: no slope in between."""
    for trace in traces:
        if trace.get("mode") == "lines":
            trace.setdefault("line", {})["shape"] = "hv"


def _listed(values: Any) -> Sequence[Any]:
    """Plain lists only: Plotly writes arrays of some libraries as bytes."""
    return values if isinstance(values, list) else ()

"""From Plotly figures and numbers to plain data that is safe inside a page, and the colours.

Figures carry no background and no font colour: the page's script sets both, for light and dark.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS: Final = (
    "#3b82c4",
    "#d97706",
    "#2e9e5b",
    "#d64550",
    "#9061c2",
    "#1197a8",
    "#a9714b",
    "#d45c9b",
    "#8a8f1d",
    "#6f7a86",
)
"""Lines in the order of their values; each stands out from white and from near-black."""

OTHERS: Final = "#9aa3ad"
"""Lines that are not highlighted."""

STATES: Final[Mapping[str, str]] = {
    "complete": "#2e9e5b",
    "pruned": "#d97706",
    "failed": "#d64550",
    "retried": "#9061c2",
    "running": "#3b82c4",
    "waiting": "#9aa3ad",
}

LEGEND_ABOVE: Final = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}

_CLEAR: Final = "rgba(0,0,0,0)"
_OWN_MARKUP: Final = re.compile(r"<(?!(?:br/?|/?b|/?i|/?sub|/?sup|/?extra)>)")


def colour(index: int) -> str:
    """The colour of the ``index``-th line; after the last they begin again."""
    return COLOURS[index % len(COLOURS)]


def faint(hexadecimal: str, opacity: float) -> str:
    """A colour that lets through what lies behind."""
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def plain(text: str) -> str:
    """``text`` so that Plotly, which reads some HTML, shows it as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def layout(*, x: str = "", y: str = "", **more: Any) -> dict[str, Any]:
    """The layout of a figure with these axis titles, which are plain text."""
    return {
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "margin": {"l": 56, "r": 12, "t": 10, "b": 44},
        "xaxis": {"title": {"text": plain(x)}, "automargin": True},
        "yaxis": {"title": {"text": plain(y)}, "automargin": True},
        "hovermode": "closest",
        "showlegend": False,
        **more,
    }


def figure_data(figure: go.Figure) -> dict[str, Any]:
    """A Plotly figure as plain data, in this report's colours and without active markup."""
    import plotly.io

    spec: dict[str, Any] = json.loads(plotly.io.to_json(figure, validate=False))
    spec = _neutral(spec)
    drawn = spec.setdefault("layout", {})
    drawn.pop("template", None)
    drawn.pop("title", None)
    drawn |= {
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "margin": {"l": 60, "r": 16, "t": 28, "b": 48},
        "colorway": list(COLOURS),
        "legend": LEGEND_ABOVE,
    }
    for key in list(drawn):
        if re.fullmatch(r"[xy]axis\d*", key):
            drawn[key]["automargin"] = True
    return {"data": spec.get("data", []), "layout": drawn}


def _neutral(item: Any) -> Any:
    """Every tag but the few that only format becomes text: a parameter's value may be a link."""
    if isinstance(item, str):
        return _OWN_MARKUP.sub("&lt;", item)
    if isinstance(item, list):
        return [_neutral(each) for each in item]
    if isinstance(item, dict):
        return {
            _neutral(key): each if key == "bdata" else _neutral(each) for key, each in item.items()
        }
    return item


def numbers(values: Iterable[float | None]) -> list[float | None]:
    """Six significant digits each, which no screen exceeds; a gap where there is no number."""
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
        for value in values
    ]


def embedded(spec: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element, whatever text is in it."""
    text = json.dumps(_finite(spec), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, code in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, code)
    return text


def _finite(item: Any) -> Any:
    if isinstance(item, float):
        return item if math.isfinite(item) else None
    if isinstance(item, Mapping):
        return {str(key): _finite(each) for key, each in item.items()}
    if isinstance(item, list | tuple):
        return [_finite(each) for each in item]
    return item

"""Optuna's own figures of a study, each as one Plotly figure."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Final

import optuna
import plotly.graph_objects as go
from optuna import visualization

_log = logging.getLogger(__name__)

_CONTOUR_AT_MOST: Final = 4

FIGURES: Final[dict[str, Callable[[optuna.Study], go.Figure]]] = {
    "optimization_history": visualization.plot_optimization_history,
    "intermediate_values": visualization.plot_intermediate_values,
    "param_importances": visualization.plot_param_importances,
    "parallel_coordinate": visualization.plot_parallel_coordinate,
    "slice": visualization.plot_slice,
    "contour": lambda study: visualization.plot_contour(study, params=_most_important(study)),
    "rank": lambda study: visualization.plot_rank(study, params=_most_important(study)),
    "edf": visualization.plot_edf,
    "timeline": visualization.plot_timeline,
}
"""Names as Optuna has them. Figures of parameters need a parameter, contours need two."""


def figures(study: optuna.Study) -> dict[str, go.Figure]:
    """Every figure that this study has enough trials and parameters for.

    A study of several objectives has its Pareto front and no figure that needs one value.
    """
    found: dict[str, go.Figure] = {}
    wanted = dict(FIGURES)
    if len(study.directions) > 1:
        wanted = {
            "pareto_front": visualization.plot_pareto_front,
            "timeline": visualization.plot_timeline,
        }
    for name, draw in wanted.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figure = draw(study)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            _log.info("no figure %s: %s", name, error)
            continue
        if figure.data:
            found[name] = figure
    return found


def _most_important(study: optuna.Study) -> list[str] | None:
    """The parameters that matter most: a contour of twenty would show nothing."""
    importances = optuna.importance.get_param_importances(study)
    names = list(importances)[:_CONTOUR_AT_MOST]
    if len(names) < 2:
        raise ValueError("a contour needs two parameters")
    return names


def page(drawn: dict[str, go.Figure], title: str) -> str:
    """All figures on one HTML page that opens offline: Plotly is inlined once."""
    import html

    parts = []
    for index, (name, figure) in enumerate(drawn.items()):
        body = figure.to_html(full_html=False, include_plotlyjs=index == 0, div_id=name)
        parts.append(f"<h2>{html.escape(name.replace('_', ' '))}</h2>\n{body}")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title></head>\n<body style='font-family: sans-serif'>"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )

"""Optuna's figures as the page shows them: on a light and a dark ground, in its own words."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from report.test_figures import ACCURACIES, finished, strings

from sweeper.report.figures import optuna_figures
from sweeper.report.restyle import SCALE, along

GROUNDS = ("#ffffff", "#14181c")
"""The page's, light and dark, as ``report.css`` has them."""


def luminance(colour: str) -> float:
    """Of WCAG 2, from ``#rrggbb`` or ``rgb(r, g, b)``."""
    if colour.startswith("#"):
        parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    else:
        parts = [round(float(part)) for part in re.findall(r"[\d.]+", colour)]
    linear = [
        part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def drawn(tmp_path: Any, **sections: Any) -> dict[str, Any]:
    data = finished(
        tmp_path,
        ACCURACIES,
        search={"sampler": "grid"},
        parameters={"optimizer.lr": [0.2, 0.1], "model.activation": ["relu", "tanh"]},
        **sections,
    )
    return {figure.name: figure.spec for figure in optuna_figures(data)}


def test_every_colour_of_the_scale_shows_on_both_grounds() -> None:
    for step in range(21):
        for ground in GROUNDS:
            assert contrast(along(step / 20), ground) >= 2.9


def test_lines_of_parallel_coordinates_are_of_that_scale_the_best_at_its_end(
    tmp_path: Any,
) -> None:
    lines = [
        trace
        for trace in drawn(tmp_path)["parallel_coordinate"]["data"]
        if trace["mode"] == "lines"
    ]
    by_place = {line["y"][0]: line["line"]["color"] for line in lines}
    assert by_place[1.0] == along(1.0)
    assert by_place[0.0] == along(0.0)


def test_where_less_is_better_the_least_is_at_the_end_of_the_scale(tmp_path: Any) -> None:
    objective = {"metric": "val_loss", "direction": "minimize"}
    lines = [
        trace
        for trace in drawn(tmp_path, objective=objective)["parallel_coordinate"]["data"]
        if trace["mode"] == "lines"
    ]
    by_place = {line["y"][0]: line["line"]["color"] for line in lines}
    assert by_place[0.0] == along(1.0)


def test_no_text_has_a_colour_of_its_own_and_no_scale_is_optunas(tmp_path: Any) -> None:
    figures = drawn(tmp_path)
    for name in ("parallel_coordinate", "slice"):
        spec = figures[name]
        notes = spec["layout"].get("annotations", ())
        assert all("color" not in note.get("font", {}) for note in notes)
        scales = [
            trace["marker"]["colorscale"]
            for trace in spec["data"]
            if trace.get("marker", {}).get("colorscale")
        ]
        assert scales
        assert all(scale == [list(stop) for stop in SCALE] for scale in scales)


def test_trials_are_whole_and_the_best_so_far_is_a_stair(tmp_path: Any) -> None:
    spec = drawn(tmp_path)["optimization_history"]
    assert spec["layout"]["xaxis"]["dtick"] == 1
    (best,) = (trace for trace in spec["data"] if trace["name"] == "best so far")
    assert best["line"]["shape"] == "hv"
    assert all(low <= high for low, high in pairwise(best["y"]))


def test_categories_have_no_quotes_and_numbers_stand_in_order(tmp_path: Any) -> None:
    layout = drawn(tmp_path)["slice"]["layout"]
    axes = {
        axis["title"]["text"]: axis["categoryarray"]
        for key, axis in layout.items()
        if key.startswith("xaxis")
    }
    assert axes == {"activation": ["relu", "tanh"], "lr": ["0.1", "0.2"]}


def test_words_are_the_reports(tmp_path: Any) -> None:
    said = {text for spec in drawn(tmp_path).values() for text in strings(spec)}
    assert not said & {"Trial", "Best Value", "Cumulative Probability", "Hyperparameter"}
    assert {"trial", "best so far", "share of trials"} <= said

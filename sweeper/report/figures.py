"""Optuna's own figures of a study, with short names and without what only sweeper's store needs.

Each is one Plotly figure as plain data: ``{"data": [...], "layout": {...}}``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, Final

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from sweeper.report.blocks import Figure
from sweeper.report.collect import StudyData
from sweeper.report.configurations import SEEDS
from sweeper.report.drawing import figure_data
from sweeper.report.restyle import restyled
from sweeper.report.wording import metric_title, short_names, value
from sweeper.store.sampling import decoded
from sweeper.study.spec import StudySpec

_log = logging.getLogger(__name__)

_CONTOUR_AT_MOST: Final = 4
_FEW: Final = 30
"""PED-ANOVA looks at what the best tenth have in common: of few trials that is one or two."""
_PARALLEL_WIDTH_PX: Final = 110
_CELL_PX: Final = 250

Draw = Callable[[optuna.Study], go.Figure]

FIGURES: Final[dict[str, tuple[str, str, Draw]]] = {
    "optimization_history": (
        "Optimization history",
        "Each completed trial's objective, and the best so far.",
        visualization.plot_optimization_history,
    ),
    "param_importances": (
        "Importance of the parameters",
        f"How much each parameter matters: by PED-ANOVA, below {_FEW} trials by fANOVA.",
        lambda study: _importances(study),  # defined below
    ),
    "edf": (
        "Distribution of the objective",
        "The share of completed trials that reached at most this objective.",
        visualization.plot_edf,
    ),
    "parallel_coordinate": (
        "Parallel coordinates",
        "One line a completed trial; the more orange, the better.",
        visualization.plot_parallel_coordinate,
    ),
    "slice": (
        "Slices",
        "The objective against each parameter; the more orange, the later the trial.",
        visualization.plot_slice,
    ),
    "contour": (
        "Contours",
        "The objective over pairs of the most important parameters.",
        lambda study: visualization.plot_contour(study, params=_most_important(study)),
    ),
    "rank": (
        "Ranks",
        "Trials over pairs of the most important parameters, coloured by rank.",
        lambda study: visualization.plot_rank(study, params=_most_important(study)),
    ),
}
"""Names as Optuna has them, each with title and caption."""

PARETO: Final[dict[str, tuple[str, str, Draw]]] = {
    "pareto_front": (
        "Pareto front",
        "On the front: trials that none beats in one objective without losing in another.",
        visualization.plot_pareto_front,
    )
}
"""What there is for several objectives."""


def optuna_figures(data: StudyData) -> list[Figure]:
    """Every figure that this study has enough trials and parameters for."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what has one value only is no news
    try:
        return _drawn(data)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _drawn(data: StudyData) -> list[Figure]:
    study = readable(data)
    objectives = data.now.spec.objective
    wanted = FIGURES if len(objectives) == 1 else PARETO
    found = []
    for name, (title, caption, draw) in wanted.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of experimental functions and thin data
                drawn = draw(study)
        except (ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
            _log.info("no figure %s: %s", name, error)
            continue
        if drawn.data:
            found.append(_figure(name, title, caption, drawn, metric_title(objectives[0].metric)))
    return found


def _figure(name: str, title: str, caption: str, drawn: go.Figure, objective: str) -> Figure:
    spec = restyled(name, figure_data(drawn), objective)
    layout: dict[str, Any] = spec["layout"]
    panels = sum(key.startswith("xaxis") for key in layout)
    side = round(panels**0.5)
    grid = name in {"contour", "rank"} and side > 1
    width = {"slice": _CELL_PX * panels, "contour": _CELL_PX * side, "rank": _CELL_PX * side}
    if name == "parallel_coordinate":
        width[name] = _PARALLEL_WIDTH_PX * len(layout.get("xaxis", {}).get("ticktext", ()))
    layout.pop("width", None)
    layout.pop("height", None)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        spec=spec,
        height_px=_CELL_PX * side if grid else 380,
        least_width_px=width.get(name, 0),
        wide=name in {"parallel_coordinate", "slice"} or grid,
    )


def readable(data: StudyData) -> optuna.Study:
    """A copy in memory of the study's current trials, whose parameters have short names.

    Seeds are left out: they tell repetitions apart, and there is nothing to learn from them.
    """
    study = data.study.study
    trials = study.get_trials(deepcopy=False)
    counted = {row.number for row in data.now.rows if row.state != "retried"}
    paths = {path for trial in trials for path in trial.distributions} - set(SEEDS)
    titles = short_names(sorted(paths))
    copy = optuna.create_study(
        directions=study.directions,
        sampler=optuna.samplers.RandomSampler(),
        study_name=study.study_name,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        copy.set_metric_names([metric_title(each.metric) for each in data.now.spec.objective])
    spec = data.now.spec
    copy.add_trials([_readable(trial, titles, spec) for trial in trials if trial.number in counted])
    return copy


def _readable(trial: FrozenTrial, titles: dict[str, str], spec: StudySpec) -> FrozenTrial:
    def worded(path: str, each: Any) -> Any:
        found = decoded(spec, {path: each})[path]
        return value(found) if isinstance(found, list | dict) else each

    def choices(path: str, kept: BaseDistribution) -> BaseDistribution:
        if not isinstance(kept, CategoricalDistribution):
            return kept
        return CategoricalDistribution(_in_order([worded(path, each) for each in kept.choices]))

    return FrozenTrial(
        number=trial.number,
        trial_id=trial.number,
        state=trial.state,
        value=None,
        values=trial.values,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params={
            titles[path]: worded(path, each)
            for path, each in trial.params.items()
            if path in titles
        },
        distributions={
            titles[path]: choices(path, each)
            for path, each in trial.distributions.items()
            if path in titles
        },
        user_attrs={},
        system_attrs={},
        intermediate_values=trial.intermediate_values,
    )


def _in_order(choices: list[Any]) -> list[Any]:
    """Numbers by size, whatever the order of the study file; others as they are."""
    if all(isinstance(each, int | float) and not isinstance(each, bool) for each in choices):
        return sorted(choices)
    return choices


def _most_important(study: optuna.Study) -> list[str]:
    """The parameters that matter most: a contour of twenty would show nothing."""
    several = _several(study)
    found = optuna.importance.get_param_importances(study, evaluator=_evaluator(study))
    names = [name for name in found if name in several][:_CONTOUR_AT_MOST]
    if len(names) < 2:
        raise ValueError("a contour needs two parameters that every trial has")
    return names


def _importances(study: optuna.Study) -> go.Figure:
    _several(study)
    return visualization.plot_param_importances(study, evaluator=_evaluator(study))


def _evaluator(study: optuna.Study) -> optuna.importance.BaseImportanceEvaluator:
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(complete) < _FEW:
        return optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.PedAnovaImportanceEvaluator()


def _several(study: optuna.Study) -> set[str]:
    """The parameters that completed trials had several values of.

    Raises ValueError where there is one, which explains everything.
    """
    seen: dict[str, set[Any]] = {}
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        for name, each in trial.params.items():
            seen.setdefault(name, set()).add(each)
    varied = {name for name, values in seen.items() if len(values) > 1}
    if len(varied) < 2:
        raise ValueError("the figure needs two parameters")
    return varied

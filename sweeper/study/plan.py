"""What a study would run, read off its spec alone: how many trials of which space. No torch.

The first configurations are the sampler's matter (`sweeper.store`); sizes of models and seconds
need torch (`sweeper.cli.planning`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sweeper.grid import grid_size
from sweeper.measurement import (
    EPOCH_METRICS,
    FINAL_METRICS,
    OBJECTIVE_METRICS,
    SUMMARY_METRICS,
)
from sweeper.space import Range, Values, structural
from sweeper.study.spec import Grid, ReferenceOnly, StudySpec

COUNTED: Final = 1_000_000
"""Spaces are counted up to so many points."""

METRICS: Final = frozenset({*EPOCH_METRICS, *FINAL_METRICS, *SUMMARY_METRICS, "model_parameters"})
"""Names that a reported result can be compared under."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedParameter:
    """One parameter of the space.

    ``values``: all values, or None for a range; ``low``, ``high``, ``log`` and ``step`` describe
    a range. ``count``: how many values it has, None where it is continuous. ``structural``:
    whether trials that differ in it cannot share a cohort.
    """

    path: str
    values: tuple[Any, ...] | None
    low: int | float | None
    high: int | float | None
    log: bool
    step: int | float | None
    count: int | None
    when: Mapping[str, tuple[Any, ...]]
    structural: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A study before it runs.

    ``trials``: the budget. ``reference_trials``: published configurations, which run besides if
    asked for. ``points``: the size of the space, None where it is continuous (and at most
    :data:`COUNTED`). ``notes``: what is allowed and yet looks like an oversight.
    """

    study: str
    trials: int
    reference_trials: int
    points: int | None
    parameters: tuple[PlannedParameter, ...]
    notes: tuple[str, ...]


def plan(spec: StudySpec) -> Plan:
    """The plan of ``spec``, which `sweeper.study.parse.load` has found free of mistakes."""
    parameters = tuple(_planned(path, each) for path, each in spec.parameters.items())
    reference = spec.reference.trials if spec.reference else ()
    finite = all(parameter.count is not None for parameter in parameters)
    points = grid_size(spec.parameters, COUNTED) if finite else None
    match spec.search.sampler:
        case Grid():
            trials = points or 0
        case ReferenceOnly():
            trials = len(reference)
        case _:
            trials = spec.search.trials or 0
    return Plan(
        study=spec.name,
        trials=trials,
        reference_trials=len(reference),
        points=points,
        parameters=parameters,
        notes=tuple(_notes(spec, trials, points)),
    )


def _planned(path: str, parameter: Values | Range) -> PlannedParameter:
    listed = isinstance(parameter, Values)
    points = parameter.values if isinstance(parameter, Values) else parameter.points
    field = parameter.model_dump(exclude={"values", "when"}) if not listed else {}
    return PlannedParameter(
        path=path,
        values=parameter.values if isinstance(parameter, Values) else None,
        low=field.get("low"),
        high=field.get("high"),
        log=field.get("log", False),
        step=field.get("step"),
        count=None if points is None else len(points),
        when=parameter.when,
        structural=structural(path),
    )


def most_epochs(spec: StudySpec) -> int:
    """The most epochs that a trial of the study may have."""
    parameter = spec.parameters.get("train.epochs")
    if parameter is None:
        return spec.train.epochs
    most = max(parameter.values) if isinstance(parameter, Values) else parameter.high
    return int(max(most, spec.train.epochs) if parameter.when else most)


def _notes(spec: StudySpec, trials: int, points: int | None) -> Iterator[str]:
    for objective in spec.objective:
        usual = OBJECTIVE_METRICS[objective.metric]
        if objective.direction != usual:
            yield f"{objective.metric} is usually to {usual}, but is to {objective.direction} here"
    least = getattr(spec.search.pruner, "min_epochs", 1)
    if least > (epochs := most_epochs(spec)):
        yield (
            f"pruner {spec.search.pruner.name} waits for {least} epochs and trials have {epochs}, "
            f"so that none is ever pruned"
        )
    sampled = not isinstance(spec.search.sampler, Grid | ReferenceOnly)
    if sampled and points is not None and points < trials:
        yield (
            f"the space has {points} points and the budget {trials} trials, so that some would "
            f"repeat; sampler grid runs each point once"
        )
    reported = {
        name: None
        for trial in (spec.reference.trials if spec.reference else ())
        for name in trial.reported
        if name not in METRICS
    }
    for name in reported:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.85)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield f"the reported {name!r} is shown, but compared with nothing measured{hint}"

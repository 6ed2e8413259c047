"""Trials that are the same but for their seed, and what they reached together."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from sweeper.space import same
from sweeper.store import TrialRow
from sweeper.study.spec import StudySpec

SEEDS: Final = ("train.seed", "data.split_seed")
"""Paths in which repetitions of one configuration differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean of ``count`` values, and their sample standard deviation where there are several."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where there is no value; NaN counts as none, and an infinite one is not hidden."""
        known = [value for value in values if value is not None and not math.isnan(value)]
        if not known:
            return None
        finite = all(map(math.isfinite, known))
        return cls(
            mean=statistics.fmean(known) if finite else sum(known),
            deviation=statistics.stdev(known) if finite and len(known) > 1 else None,
            count=len(known),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """One point of the space, seeds aside, with every trial at it.

    ``resolved`` is the whole configuration as nested plain data, None for one that no trial can
    have. ``params`` are the values that its first trial set.
    """

    key: str
    resolved: Mapping[str, Any] | None
    params: Mapping[str, Any]
    rows: tuple[TrialRow, ...]

    @property
    def complete(self) -> list[TrialRow]:
        return [row for row in self.rows if row.state == "complete" and row.values]

    @property
    def numbers(self) -> list[int]:
        return [row.number for row in self.rows]

    def metric(self, name: str) -> Spread | None:
        """A metric over the completed trials."""
        return Spread.of(measured(row, name) for row in self.complete)

    def objective(self, index: int = 0) -> Spread | None:
        """An objective over the completed trials."""
        return Spread.of(row.values[index] for row in self.complete)


def measured(row: TrialRow, name: str) -> float | None:
    """What a trial has under a metric's name, its number of parameters included."""
    if name in {"parameters", "model_parameters"}:
        return None if row.model_parameters is None else float(row.model_parameters)
    return row.metrics.get(name)


def resolved(spec: StudySpec, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The whole configuration of a point, or None where its values do not fit together."""
    try:
        return spec.trial_config(params).model_dump(mode="json")
    except ValidationError:
        return None


def identity(config: Mapping[str, Any] | None, params: Mapping[str, Any]) -> str:
    """What two points share whose resolved configurations are equal but for the seeds."""
    if config is None:
        return json.dumps(["invalid", dict(params)], sort_keys=True, default=str)
    whole = {name: dict(section) for name, section in config.items()}
    for path in SEEDS:
        section, leaf = path.split(".")
        whole[section].pop(leaf, None)
    return json.dumps(whole, sort_keys=True)


def configurations(spec: StudySpec, rows: Sequence[TrialRow]) -> tuple[Configuration, ...]:
    """The configurations of all trials that count, in the order of their first trials."""
    groups: dict[str, tuple[Mapping[str, Any] | None, list[TrialRow]]] = {}
    for row in rows:
        drawn = row.params or not spec.parameters
        if row.state != "retried" and (drawn or row.state not in {"waiting", "running"}):
            config = resolved(spec, row.params)
            groups.setdefault(identity(config, row.params), (config, []))[1].append(row)
    return tuple(
        Configuration(
            key=key,
            resolved=config,
            params={k: v for k, v in members[0].params.items() if k not in SEEDS},
            rows=tuple(members),
        )
        for key, (config, members) in groups.items()
    )


def ranked(spec: StudySpec, found: Iterable[Configuration]) -> list[Configuration]:
    """Those with a completed trial, the best mean of the first objective first."""
    sign = -1 if spec.objective[0].maximize else 1
    scored = [(config.objective(), config) for config in found]
    done = [(spread.mean, config) for spread, config in scored if spread is not None]
    done.sort(key=lambda pair: (sign * pair[0], pair[1].rows[0].number))
    return [config for _, config in done]


def setting(
    spec: StudySpec, config: Mapping[str, Any] | None, params: Mapping[str, Any], path: str
) -> Any:
    """The value at ``path`` of a point: its own, else the study's; None where it has no say."""
    if path in params:
        return params[path]
    parameter = spec.parameters.get(path)
    if parameter is not None and not parameter.holds(params):
        return None
    found: Any = config
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


Point = tuple[Mapping[str, Any] | None, Mapping[str, Any]]
"""A resolved configuration, and the values that it was made with."""


def varied(spec: StudySpec, points: Sequence[Point]) -> list[str]:
    """The paths in which ``points`` differ, seeds aside: those of the space first.

    Where nothing differs, all paths that a point sets.
    """
    paths = list(spec.parameters)
    paths += sorted({path for _, params in points for path in params} - set(paths))
    paths = [path for path in paths if path not in SEEDS]
    differing = []
    for path in paths:
        seen = [setting(spec, config, params, path) for config, params in points]
        if any(not same(value, seen[0]) for value in seen[1:]):
            differing.append(path)
    return differing or [path for path in paths if any(path in params for _, params in points)]

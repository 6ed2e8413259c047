"""The search space: ``parameters`` of a study file, on dotted paths into a trial's configuration.

A parameter is a list of values or a range, and may hold only under a condition (``when``) on
other parameters. Pure values: how a sampler draws a point is the store's matter
(`sweeper.store`); :func:`draw` is plain random drawing, which checks and previews use.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self, cast, overload

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from sweeper.config import Section

Scalar = None | bool | int | float | str
Conditions = Mapping[str, tuple[Any, ...]]

MAX_VALUES: Final = 1_000
"""The most values that a list may have."""
MAX_WIDTH: Final = 2**53
"""The widest range: beyond it floats no longer tell whole numbers apart."""
MAX_STEPS: Final = 100_000
"""The most points that a range with a step may have; a finer one is meant to be continuous."""

FUSIBLE: Final = frozenset(
    {
        "model.init",
        "model.dropout",
        "optimizer.name",
        "optimizer.lr",
        "optimizer.weight_decay",
        "optimizer.momentum",
        "optimizer.beta2",
        "optimizer.eps",
        "optimizer.clip_norm",
        "optimizer.schedule",
        "optimizer.schedule.name",
        "optimizer.schedule.gamma",
        "optimizer.schedule.min_lr",
        "optimizer.schedule.factor",
        "optimizer.schedule.patience",
        "optimizer.schedule.monitor",
        "train.epochs",
        "train.label_smoothing",
        "train.seed",
    }
)
"""Paths that become one number a member, or one initial weight vector a member, of a cohort."""


class _Parameter(Section):
    """``when`` maps other parameters to the values under which this one holds."""

    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict, strict=False)

    @field_validator("when", mode="before")
    @classmethod
    def _one_value_or_several(cls, when: Any) -> Any:
        if not isinstance(when, dict):
            return when
        return {
            path: tuple(value) if isinstance(value, list | tuple) else (value,)
            for path, value in when.items()
        }

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether every condition is met by ``values``; a path that is absent meets none."""
        return all(
            path in values and any(same(values[path], allowed) for allowed in options)
            for path, options in self.when.items()
        )


class Values(_Parameter):
    """A list of values, of any type that the field takes; unordered to the sampler."""

    values: tuple[Any, ...] = Field(min_length=1, max_length=MAX_VALUES, strict=False)

    @field_validator("values")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        seen: set[Hashable] = set()
        for value in values:
            if (identity := _identity(value)) in seen:
                raise ValueError(f"every value must be listed once, but {value!r} is there twice")
            seen.add(identity)
        return values


class _Steps(Sequence[float]):
    """``low``, ``low + step`` and so on, each made when it is asked for."""

    def __init__(self, low: float, step: float, count: int) -> None:
        self._low, self._step, self._indices = low, step, range(count)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        found = self._indices[index]
        return self._at(found) if isinstance(found, int) else tuple(map(self._at, found))

    def _at(self, index: int) -> float:
        # Fifteen digits: 0.1 + 2 * 0.1 is to read 0.3, and must not exceed a high of 0.3.
        return float(f"{self._low + index * self._step:.15g}")


class Range(_Parameter):
    """All numbers from ``low`` to ``high``, both included; whole numbers if both bounds are.

    ``log`` draws the logarithm evenly, ``step`` leaves only ``low``, ``low + step`` and so on.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(
                f"low <= high must hold, but got low={self.low}, high={self.high}; swap them"
            )
        if not self.high - self.low < MAX_WIDTH:
            raise ValueError(
                f"high - low < 2^53 must hold, but got low={self.low}, high={self.high}; "
                f"narrow the range"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"low > 0 must hold where log is true, but got low={self.low}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step > 0 must hold, but got step={self.step}")
        if self.log and self.step is not None:
            raise ValueError("step and log exclude each other, but both are given; leave one out")
        if self.integer and isinstance(self.step, float):
            raise ValueError(
                f"step must be whole where low and high are, but got step={self.step}; "
                f"write low as {float(self.low)} for a range of real numbers"
            )
        if not self.integer and self.step and (self.high - self.low) / self.step >= MAX_STEPS:
            raise ValueError(
                f"step must leave at most {MAX_STEPS:,} points, but got step={self.step}; "
                f"leave it out for a continuous range"
            )
        return self

    @property
    def integer(self) -> bool:
        """Whether the range holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def points(self) -> Sequence[int | float] | None:
        """All values, or None where the range is continuous."""
        if self.integer:
            return range(int(self.low), int(self.high) + 1, int(self.step or 1))
        if self.step is None:
            return (float(self.low),) if self.low == self.high else None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return _Steps(self.low, self.step, count)


def _kind(value: Any) -> str | None:
    if isinstance(value, Values) or (isinstance(value, dict) and "values" in value):
        return "values"
    if isinstance(value, Range) or (
        isinstance(value, dict) and ("low" in value or "high" in value)
    ):
        return "range"
    return None


def _listed(value: Any) -> Any:
    return {"values": value} if isinstance(value, list | tuple) else value


Parameter = Annotated[
    Annotated[
        Annotated[Values, Tag("values")] | Annotated[Range, Tag("range")], Discriminator(_kind)
    ],
    BeforeValidator(_listed),
]
"""A list of values, a mapping with ``values``, or a mapping with ``low`` and ``high``."""
Kind = Literal["values", "range"]


def encode(value: Any) -> Scalar:
    """The scalar that stands for ``value`` in an Optuna study: lists and mappings become JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


_PLAIN: Final = frozenset({int, float, str, type(None)})
"""Types whose values are the same where Python calls them equal; a bool would equal an int."""


def _identity(value: Any) -> Hashable:
    """What two values share that are the same to a study: 1 and 1.0, a tuple and a list."""
    if type(value) in _PLAIN:
        return cast(Hashable, value)
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, list | tuple):
        return ("list", *map(_identity, value))
    if isinstance(value, Mapping):
        return ("mapping", frozenset((key, _identity(each)) for key, each in value.items()))
    return value if isinstance(value, Hashable) else ("repr", repr(value))


def same(left: Any, right: Any) -> bool:
    """Equality that tells ``True`` from ``1`` and takes 1 for 1.0, tuples for lists."""
    if type(left) in _PLAIN and type(right) in _PLAIN:
        return bool(left == right)
    return _identity(left) == _identity(right)


def position(parameter: Values, value: Any) -> int | None:
    """The index of ``value`` among the parameter's values, or None where it is not one of them."""
    return next(
        (index for index, option in enumerate(parameter.values) if same(option, value)), None
    )


def contains(parameter: Values | Range, value: Any) -> bool:
    """Whether the sampler could have drawn ``value``."""
    if isinstance(parameter, Values):
        return position(parameter, value) is not None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not parameter.low <= value <= parameter.high:
        return False
    if parameter.integer:
        return (value - parameter.low) % (parameter.step or 1) == 0
    return math.isclose(nearest(parameter, value), value, rel_tol=1e-12, abs_tol=1e-15)


def nearest(parameter: Range, value: int | float) -> int | float:
    """The point of a range with steps that ``value`` stands for; of other ranges ``value``.

    Samplers compute ``low + 3 * step``, which for steps of 0.1 is 0.30000000000000004: to a file,
    to its conditions and to a grid it is 0.3.
    """
    points = parameter.points
    if parameter.integer or parameter.step is None or points is None:
        return value
    index = round((value - parameter.low) / parameter.step)
    return points[min(max(index, 0), len(points) - 1)]


def possible(parameter: Values | Range, options: Sequence[Any]) -> list[Any]:
    """Those of ``options`` that the sampler could have drawn, each once, as it would draw them."""
    if isinstance(parameter, Values):
        own = {_identity(value): value for value in parameter.values}
        wanted = dict.fromkeys(map(_identity, options))
        return [own[identity] for identity in wanted if identity in own]
    number = int if parameter.integer else float
    drawn = (nearest(parameter, number(each)) for each in options if contains(parameter, each))
    return list(dict.fromkeys(drawn))


def structural(path: str) -> bool:
    """Whether trials that differ in ``path`` cannot share one cohort.

    A structural parameter changes a shape, the data, an epoch's number of steps or the program.
    What is not known to be otherwise counts as structural: a cohort too few costs time, a cohort
    too many would cost correctness.
    """
    return path not in FUSIBLE


def circle(parameters: Mapping[str, Values | Range]) -> list[str] | None:
    """Parameters whose conditions need each other, the first one also last; None for none."""
    return _sorted(parameters)[1]


def ordered(parameters: Mapping[str, Values | Range]) -> list[str]:
    """Paths, each after those that its conditions name; otherwise in the file's order.

    Raises ValueError naming the circle where conditions depend on each other. Conditions on paths
    that are no parameters are ignored here; the study file's check names them.
    """
    order, found = _sorted(parameters)
    if found:
        raise ValueError("conditions must not form a circle, but " + " needs ".join(found))
    return order


def _sorted(
    parameters: Mapping[str, Values | Range],
) -> tuple[list[str], list[str] | None]:
    done: dict[str, None] = {}
    for start in parameters:
        waiting = [] if start in done else [start]
        while waiting:
            path = waiting[-1]
            parent = next(
                (name for name in parameters[path].when if name in parameters and name not in done),
                None,
            )
            if parent is None:
                done[waiting.pop()] = None
            elif parent in waiting:
                return list(done), [*waiting[waiting.index(parent) :], parent]
            else:
                waiting.append(parent)
    return list(done), None


def requirements(
    parameters: Mapping[str, Values | Range], path: str
) -> dict[str, tuple[Any, ...]] | None:
    """What must be chosen so that ``path`` holds: its ancestors, each with the values allowed.

    None where no choice does it. Conditions are conjunctions of "parent is one of", and a parent
    has to hold itself, so intersecting the options along all ancestors is exact.
    """
    allowed: dict[str, tuple[Any, ...]] = {}
    waiting, seen = [path], {path}
    while waiting:
        for parent, options in parameters[waiting.pop()].when.items():
            if parent not in parameters:
                return None
            found = possible(parameters[parent], options)
            if parent in allowed:
                known = set(map(_identity, allowed[parent]))
                found = [option for option in found if _identity(option) in known]
            allowed[parent] = tuple(found)
            if not found:
                return None
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return allowed


def draw(
    parameters: Mapping[str, Values | Range],
    rng: random.Random,
    among: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """One random point that observes the conditions.

    ``among`` narrows parameters to some of their values; the others are drawn from all of theirs.
    """
    values: dict[str, Any] = {}
    for path in ordered(parameters):
        parameter = parameters[path]
        if parameter.holds(values):
            narrowed = (among or {}).get(path)
            values[path] = rng.choice(narrowed) if narrowed else _drawn(parameter, rng)
    return values


def _drawn(parameter: Values | Range, rng: random.Random) -> Any:
    if isinstance(parameter, Values):
        return rng.choice(parameter.values)
    points, low, high = parameter.points, parameter.low, parameter.high
    if not parameter.log:
        return rng.choice(points) if points is not None else rng.uniform(low, high)
    # Whole numbers: each owns the unit interval around it on the logarithmic scale, as in Optuna.
    margin = 0.5 if parameter.integer else 0.0
    value = math.exp(rng.uniform(math.log(low - margin), math.log(high + margin)))
    return min(max(round(value) if parameter.integer else value, low), high)

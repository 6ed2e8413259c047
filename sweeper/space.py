"""The search space: ``parameters`` of a study file, on dotted paths into a trial's configuration.

A parameter is a list of values or a range, and may hold only under a condition (``when``) on
other parameters. Pure values: how a point is drawn is the store's matter (`sweeper.store`).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from sweeper.config import Section

Scalar = None | bool | int | float | str
Conditions = Mapping[str, tuple[Any, ...]]


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
            path in values and any(_same(values[path], allowed) for allowed in options)
            for path, options in self.when.items()
        )


class Values(_Parameter):
    """A list of values, of any type that the field takes; unordered to the sampler."""

    values: tuple[Any, ...] = Field(min_length=1, strict=False)

    @field_validator("values")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        seen: list[str] = []
        for value in values:
            key = json.dumps(value, sort_keys=True)
            if key in seen:
                raise ValueError(f"every value may be listed once, but {value!r} is there twice")
            seen.append(key)
        return values


class Range(_Parameter):
    """All numbers from ``low`` to ``high``, both included; whole numbers if both bounds are."""

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
        if self.log and self.low <= 0:
            raise ValueError(f"low > 0 must hold where log is true, but got low={self.low}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step > 0 must hold, but got step={self.step}")
        if self.log and self.step is not None:
            raise ValueError("step and log exclude each other; leave one out")
        if self.integer and isinstance(self.step, float):
            raise ValueError(
                f"step must be whole where low and high are, but got step={self.step}; "
                f"write low as {float(self.low)} for a range of real numbers"
            )
        return self

    @property
    def integer(self) -> bool:
        """Whether the range holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def points(self) -> tuple[int | float, ...] | None:
        """All values, or None where the range is continuous."""
        if self.integer:
            return tuple(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.step is None:
            return (self.low,) if self.low == self.high else None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.low + index * self.step for index in range(count))


def _kind(value: Any) -> str | None:
    if isinstance(value, Values) or (isinstance(value, dict) and "values" in value):
        return "values"
    if isinstance(value, Range | dict):
        return "range"
    return None


Parameter = Annotated[
    Annotated[Values, Tag("values")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]
Kind = Literal["values", "range"]


def encode(value: Any) -> Scalar:
    """The scalar that stands for ``value`` in an Optuna study: lists and mappings become JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _same(left: Any, right: Any) -> bool:
    """Equality that tells ``True`` from ``1`` and takes 1 for 1.0, tuples for lists."""
    if isinstance(left, bool) is not isinstance(right, bool):
        return False
    return bool(encode(left) == encode(right))


def position(parameter: Values, value: Any) -> int | None:
    """The index of ``value`` among the parameter's values, or None where it is not one of them."""
    return next(
        (index for index, option in enumerate(parameter.values) if _same(option, value)), None
    )


def contains(parameter: Values | Range, value: Any) -> bool:
    """Whether the sampler could have drawn ``value``."""
    if isinstance(parameter, Values):
        return position(parameter, value) is not None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not parameter.low <= value <= parameter.high:
        return False
    if parameter.points is None:
        return True
    return any(math.isclose(value, point, rel_tol=1e-9) for point in parameter.points)


def ordered(parameters: Mapping[str, Values | Range]) -> list[str]:
    """Paths, each after those that its conditions name; otherwise in the file's order.

    Raises ValueError naming the cycle where conditions depend on each other. Conditions on paths
    that are no parameters are ignored here; the study file's check names them.
    """
    done: list[str] = []
    waiting: list[str] = []

    def visit(path: str) -> None:
        if path in done:
            return
        if path in waiting:
            cycle = [*waiting[waiting.index(path) :], path]
            raise ValueError("conditions must not form a circle, but " + " needs ".join(cycle))
        waiting.append(path)
        for parent in parameters[path].when:
            if parent in parameters:
                visit(parent)
        waiting.pop()
        done.append(path)

    for path in parameters:
        visit(path)
    return done


def grid(parameters: Mapping[str, Values | Range]) -> Iterator[dict[str, Any]]:
    """Every combination of values, the last parameter fastest, with conditions observed.

    Raises ValueError for a continuous range, which has no grid points.
    """
    order = ordered(parameters)

    def options(path: str) -> Sequence[Any]:
        parameter = parameters[path]
        points = parameter.values if isinstance(parameter, Values) else parameter.points
        if points is None:
            raise ValueError(f"{path}: a grid needs a list of values or a step")
        return points

    def extend(chosen: dict[str, Any], rest: Sequence[str]) -> Iterator[dict[str, Any]]:
        if not rest:
            yield dict(chosen)
        elif parameters[rest[0]].holds(chosen):
            for value in options(rest[0]):
                yield from extend({**chosen, rest[0]: value}, rest[1:])
        else:
            yield from extend(chosen, rest[1:])

    for path in order:
        options(path)
    return extend({}, order)


def grid_size(parameters: Mapping[str, Values | Range], limit: int = 1_000_000) -> int:
    """How many points :func:`grid` has, counted up to ``limit``."""
    return sum(1 for _ in itertools.islice(grid(parameters), limit))

"""Values of a study's parameters as a person types them: ``path=value``, the value in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

from sweeper.errors import UsageError
from sweeper.space import (
    Range,
    Values,
    contains,
    nearest,
    ordered,
    position,
    requirements,
    same,
)
from sweeper.study.source import compose
from sweeper.study.spec import StudySpec
from sweeper.study.suggest import did_you_mean

_NAMED: Final = 20


def typed_point(spec: StudySpec, words: Sequence[str]) -> dict[str, Any]:
    """Path → value, each one that the study's sampler could have chosen beside the others.

    Raises UsageError, which names all that is wrong.
    """
    given: dict[str, Any] = {}
    wrong: list[str] = []
    for word in words:
        path, equals, text = (part.strip() for part in word.partition("="))
        if not path or not equals:
            wrong.append(f"a value must be typed as path=value, but got {word!r}")
            continue
        node, mistakes = compose(text, word)
        if node is None or mistakes:
            wrong.append(f"{path} must be YAML, but: {mistakes[0].message}")
        elif path in given:
            wrong.append(f"{path} must be given once, but is there twice")
        else:
            given[path] = node.data
    unknown = given.keys() - spec.parameters.keys()
    wrong += [_unknown(path, spec) for path in given if path in unknown]
    point: dict[str, Any] = {}
    for path in (each for each in ordered(spec.parameters) if each in given):
        parameter, value = spec.parameters[path], given[path]
        if not contains(parameter, value):
            wrong.append(f"{path} must be {_allowed(parameter)}, but got {value!r}")
        elif not parameter.holds(point):
            wrong.append(f"{path} is a parameter only where {_conditions(parameter)}; give that")
        else:
            point[path] = _as_drawn(parameter, value)
    if not wrong and not still_open(spec, point):
        wrong += _unfit(spec, point)
    if wrong:
        raise UsageError("\n".join(wrong))
    return point


def still_open(spec: StudySpec, point: Mapping[str, Any]) -> list[str]:
    """The parameters that ``point`` leaves to the sampler, as far as its values tell."""
    found = []
    for path in (each for each in ordered(spec.parameters) if each not in point):
        needs = requirements(spec.parameters, path)
        if needs is not None and all(
            any(same(point[parent], option) for option in options)
            for parent, options in needs.items()
            if parent in point
        ):
            found.append(path)
    return found


def _unknown(path: str, spec: StudySpec) -> str:
    known = list(spec.parameters)
    if not known:
        return f"{path} must be a parameter of {spec.name!r}, but it has none"
    hint = did_you_mean(path, known)
    return f"{path} must be a parameter of {spec.name!r} ({', '.join(known)}){hint}"


def _allowed(parameter: Values | Range) -> str:
    if isinstance(parameter, Values):
        more = ", …" if len(parameter.values) > _NAMED else ""
        return f"one of {', '.join(map(repr, parameter.values[:_NAMED]))}{more}"
    steps = f" in steps of {parameter.step}" if parameter.step else ""
    kind = "a whole number" if parameter.integer else "a number"
    return f"{kind} from {parameter.low} to {parameter.high}{steps}"


def _conditions(parameter: Values | Range) -> str:
    return " and ".join(
        f"{path} is {' or '.join(map(repr, options))}" for path, options in parameter.when.items()
    )


def _as_drawn(parameter: Values | Range, value: Any) -> Any:
    if isinstance(parameter, Range):
        return nearest(parameter, int(value) if parameter.integer else float(value))
    index = position(parameter, value)
    return value if index is None else parameter.values[index]


def _unfit(spec: StudySpec, point: Mapping[str, Any]) -> list[str]:
    """What keeps a whole point from being a trial."""
    try:
        spec.trial_config(point)
    except ValidationError as error:
        return [f"no trial can have these values: {found['msg']}" for found in error.errors()]
    return []

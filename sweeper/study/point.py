"""Values of a study's parameters as a person types them: ``path=value``, the value in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from sweeper.errors import UsageError
from sweeper.space import Range, Values, ordered, possible, requirements, same
from sweeper.study.parameters import takes_not
from sweeper.study.source import compose
from sweeper.study.spec import StudySpec
from sweeper.study.suggest import did_you_mean


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
        drawn = possible(parameter, [value])
        if not drawn:
            wrong.append(f"{path} must be {takes_not(parameter, value)}")
        elif not parameter.holds(point):
            wrong.append(f"{path} is a parameter only where {_conditions(parameter)}; give that")
        else:
            point[path] = drawn[0]
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


def _conditions(parameter: Values | Range) -> str:
    return " and ".join(
        f"{path} is {' or '.join(map(repr, options))}" for path, options in parameter.when.items()
    )


def _unfit(spec: StudySpec, point: Mapping[str, Any]) -> list[str]:
    """What keeps a whole point from being a trial."""
    try:
        spec.trial_config(point)
    except ValidationError as error:
        return [f"no trial can have these values: {found['msg']}" for found in error.errors()]
    return []

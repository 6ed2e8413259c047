"""Checks that build trials: values that are right one by one and do not fit together.

Every point of a small grid is built, and of a larger space each value of each parameter once
besides a few hundred seeded random points. What fails is told as the fewest values that do it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from sweeper.grid import grid, grid_size
from sweeper.space import (
    Range,
    Values,
    draw,
    ordered,
    position,
    requirements,
    same,
)
from sweeper.study.draft import Draft
from sweeper.study.messages import Finding, Path, findings
from sweeper.study.spec import SECTIONS, TrialConfig, overlay
from sweeper.study.variants import fields_of

ALL_POINTS: Final = 2_000
"""Spaces of up to so many points are built completely."""
RANDOM_POINTS: Final = 200
ALTERNATIVES: Final = 8
ANALYSED: Final = 20
"""So many failing points are looked into; more say nothing new."""

Point = Mapping[str, Any]
Failures = Callable[[Point], list[Finding]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cause:
    """Why points fail: what they share, and the parameters of which another value helps.

    ``value``: set where one value of one list is to blame, in a tuple.
    """

    kind: str
    involved: tuple[str, ...]
    value: tuple[Any, ...] = ()

    def explains(self, kind: str, point: Point) -> bool:
        if kind != self.kind:
            return False
        return not self.value or same(point.get(self.involved[0], _ABSENT), self.value[0])


_ABSENT: Final = ("absent",)


def combination_mistakes(draft: Draft) -> Iterator[Finding]:
    """What fails when the trials of the space, and of the reference, are put together."""
    sections = draft.spec.sections()

    def failures(point: Point) -> list[Finding]:
        return _failures(sections, point)

    if not (draft.sound("data") and draft.sound("model")):
        return
    told: set[str] = set()
    if draft.sound("parameters"):
        for finding in _space_mistakes(draft, failures):
            told.add(finding.message)
            yield finding
    elif not any(path.startswith(("data.", "model.")) for path in draft.spec.parameters):
        # What was refused elsewhere stands as its default: model and data still have to fit.
        for finding in failures({}):
            yield Finding(path=_section_path(finding), message=finding.message, at=finding.at)
    trials = draft.spec.reference.trials if draft.spec.reference else ()
    for index, trial in enumerate(trials):
        base: Path = ("reference", "trials", index)
        if draft.sound(*base):
            for finding in failures(trial.params):
                about = _param_path(finding, trial.params)
                if about:
                    yield Finding(path=(*base, "params", about), message=finding.message)
                elif finding.message not in told:  # else the sections are to blame
                    yield Finding(path=base, message=finding.message)


def _failures(sections: Mapping[str, Any], point: Point) -> list[Finding]:
    try:
        TrialConfig.model_validate(overlay(sections, point))
    except ValidationError as error:
        return findings(error, TrialConfig)
    return []


def _space_mistakes(draft: Draft, failures: Failures) -> Iterator[Finding]:
    causes: list[_Cause] = []
    analysed = 0
    for point in _points(draft.spec.parameters):
        for finding in failures(point):
            kind = _kind(finding)
            known = any(cause.explains(kind, point) for cause in causes)
            if known or analysed >= ANALYSED:
                continue
            analysed += 1
            cause = _cause(draft.spec.parameters, point, kind, failures)
            causes.append(cause)
            yield _report(draft, finding, point, cause)


def _kind(finding: Finding) -> str:
    """What failures of one cause share: where, and the words before the first figure."""
    words = finding.message.split(",")[0]
    return f"{finding.path}{''.join(c for c in words if not c.isdigit())}"


def _cause(
    parameters: Mapping[str, Values | Range], point: Point, kind: str, failures: Failures
) -> _Cause:
    involved = tuple(_involved(parameters, point, kind, failures))
    one_value = len(involved) == 1 and isinstance(parameters[involved[0]], Values)
    value = (point[involved[0]],) if one_value else ()
    return _Cause(kind=kind, involved=involved, value=value)


def _points(parameters: Mapping[str, Values | Range]) -> Iterator[Point]:
    finite = all(not isinstance(p, Range) or p.points is not None for p in parameters.values())
    if finite and grid_size(parameters, ALL_POINTS + 1) <= ALL_POINTS:
        yield from grid(parameters)
        return
    rng = random.Random(0)
    for path, parameter in parameters.items():
        needed = requirements(parameters, path) or {}
        for value in _some_values(parameter, rng):
            yield draw(parameters, rng, {**needed, path: [value]})
    for _ in range(RANDOM_POINTS):
        yield draw(parameters, rng)


def _some_values(parameter: Values | Range, rng: random.Random) -> Sequence[Any]:
    if isinstance(parameter, Values):
        return parameter.values
    drawn = [draw({"": parameter.model_copy(update={"when": {}})}, rng)[""] for _ in range(3)]
    number = int if parameter.integer else float
    return [number(parameter.low), number(parameter.high), *drawn]


def _involved(
    parameters: Mapping[str, Values | Range], point: Point, kind: str, failures: Failures
) -> list[str]:
    """The parameters of ``point`` of which another value would avoid the failure."""
    rng = random.Random(0)
    found = []
    for path in point:
        parameter = parameters[path]
        if isinstance(parameter, Values):
            others: Sequence[Any] = parameter.values[: ALTERNATIVES + 1]
        else:
            others = [v for _ in range(3) for v in _some_values(parameter, rng)]
        for other in others:
            changed = _holding(parameters, {**point, path: other})
            if all(_kind(finding) != kind for finding in failures(changed)):
                found.append(path)
                break
    return found


def _holding(parameters: Mapping[str, Values | Range], point: Point) -> Point:
    """``point`` without the parameters whose conditions it does not meet."""
    left: dict[str, Any] = {}
    for path in ordered(parameters):
        if path in point and parameters[path].holds(left):
            left[path] = point[path]
    return left


def _report(draft: Draft, finding: Finding, point: Point, cause: _Cause) -> Finding:
    """The finding at the parameter it is about, with an example where others have a part in it."""
    involved = cause.involved
    about = _param_path(finding, point)
    if finding.at == "key" and about and about == ".".join(map(str, finding.path)):
        return _foreign(draft, about, finding.message)
    if len(involved) == 1 and about in (None, involved[0]):
        return _one_to_blame(draft, finding, point, involved[0])
    if involved:
        names = [path for path in point if path in involved or path == about]
        example = ", ".join(f"{path}={point[path]}" for path in names)
        return Finding(
            path=("parameters", about or involved[0]),
            message=f"{finding.message}; that is so for {example}: leave such values out, or set "
            f"'when'",
            at="key",
        )
    if about:
        return Finding(path=("parameters", about), message=finding.message, at="key")
    return Finding(path=_section_path(finding), message=finding.message, at=finding.at)


def _one_to_blame(draft: Draft, finding: Finding, point: Point, path: str) -> Finding:
    """One value of a list is wrong by itself, or a range holds values that are."""
    parameter = draft.spec.parameters[path]
    if isinstance(parameter, Values):
        index = position(parameter, point[path]) or 0
        return Finding(path=("parameters", path, "values", index), message=finding.message)
    fix = f"give {path} a step, or list its values (it may now be {point[path]})"
    return Finding(path=("parameters", path), message=f"{finding.message}; {fix}")


def _foreign(draft: Draft, path: str, message: str) -> Finding:
    """A parameter that some variant of its section does not have, and no condition to say so."""
    parent, _, leaf = path.rpartition(".")
    chooser = draft.spec.parameters.get(f"{parent}.name")
    owners = [
        str(name)
        for name in (chooser.values if isinstance(chooser, Values) else ())
        if leaf in (fields_of(parent, str(name)) or ())
    ]
    if owners:
        message += f"; give {path} the condition when: {{{parent}.name: [{', '.join(owners)}]}}"
    return Finding(path=("parameters", path), message=message, at="key")


def _param_path(finding: Finding, point: Point) -> str | None:
    """The parameter of ``point`` that the finding is about, or None where it is about none."""
    words = [str(part) for part in _section_path(finding)]
    dotted = (".".join(words[:length]) for length in range(len(words), 0, -1))
    return next((path for path in dotted if path in point), None)


def _section_path(finding: Finding) -> Path:
    """Where in the sections a failure lies; a check of several fields names one of them first.

    A field without its section is the model's.
    """
    if finding.path:
        return finding.path
    words = finding.message.split(" ", 1)[0].split(".")
    path = words if words[0] in SECTIONS else ["model", *words]
    return tuple(path) if all(word.isidentifier() for word in path) else ("model",)

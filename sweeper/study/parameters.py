"""Checks of ``parameters``: that paths name fields, fields take the values, conditions can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sweeper.space import Range, Values, circle, possible, requirements
from sweeper.study.describe import expected, listed, shown
from sweeper.study.draft import Draft
from sweeper.study.messages import Finding, Path, findings
from sweeper.study.spec import SECTIONS, StudySpec
from sweeper.study.suggest import did_you_mean, nearest
from sweeper.study.variants import (
    display_name,
    fields_at,
    is_open,
    names_of,
    parameter_paths,
    variant,
    variants,
)

Point = Mapping[str, Any]


def parameter_mistakes(draft: Draft) -> Iterator[Finding]:
    """Every mistake that one parameter or one condition has by itself."""
    named = draft.root.find(("parameters",))
    paths = list(named.value) if named is not None and isinstance(named.value, dict) else []
    for path in paths if ("parameters",) not in draft.broken else ():
        if wrong := path_mistake(draft, path):
            yield Finding(path=("parameters", path), message=wrong, at="key")
        elif path in draft.spec.parameters:
            yield from _value_mistakes(draft, path)
    yield from _overlaps(draft)
    yield from _condition_mistakes(draft)


def path_mistake(draft: Draft, path: str, chosen: Point | None = None) -> str | None:
    """Why the dotted ``path`` names no field of any trial of this study, or None where it does.

    ``chosen``: the values of one trial, whose names go before those of the study.
    """
    section, *inner = path.split(".")
    if section not in SECTIONS and section in StudySpec.model_fields:
        return (
            f"a parameter must be a field of {listed(SECTIONS)}; {section} is the same for "
            f"every trial"
        )
    if section in SECTIONS and not inner:
        return f"a parameter must be one field of a section, such as {_fields(path)[0]}"
    parent, _, leaf = path.rpartition(".")
    here = occurring(draft, parent, chosen)
    if any(leaf in model.model_fields or is_open(model) for model in here):
        return None
    if elsewhere := fields_at(path):
        owners = ", ".join(display_name(model) for model, _ in elsewhere)
        what = parent.rpartition(".")[2]
        names = ", ".join(display_name(model) for model in here)
        return f"{leaf} belongs to {what} {owners}; this {what} is {names}"
    if fields_at(parent) and not variants(parent):
        takes = expected(fields_at(parent)[0][1].rebuild_annotation())
        return f"a parameter must be a field of a trial, but inside {parent}, {takes}, is none"
    return (
        f"a parameter must be a field of a trial, but there is no {shown(path)}{_near(draft, path)}"
    )


def _fields(path: str) -> list[str]:
    return [known for known in parameter_paths() if known.startswith(path + ".")]


def _near(draft: Draft, path: str) -> str:
    """What path was meant: one with the same last word, or one that is spelled alike."""
    parent, _, leaf = path.rpartition(".")
    known = {each: each.rpartition(".")[2] for each in parameter_paths() if _occurs(draft, each)}
    beside = {word: each for each, word in known.items() if each == f"{parent}.{word}"}
    meant = next((each for each, word in known.items() if word == leaf), None)
    meant = meant or beside.get(nearest(leaf, beside) or "") or nearest(path, known)
    return f"; did you mean {meant!r}?" if meant else ""


def _occurs(draft: Draft, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return any(leaf in model.model_fields for model in occurring(draft, parent))


def occurring(draft: Draft, path: str, chosen: Point | None = None) -> list[type[BaseModel]]:
    """The variants of the section at ``path`` that some trial of the study may have."""
    models = variants(path)
    if len(models) < 2:
        return list(models)
    own = (chosen or {}).get(f"{path}.name", (chosen or {}).get(path))
    own = own.get("name") if isinstance(own, dict) else own
    names = [own] if isinstance(own, str) else _names(draft, path)
    if names is None:
        return list(models)
    found = (variant(path, name) for name in names)
    return [model for model in dict.fromkeys(found) if model is not None]


def _names(draft: Draft, path: str) -> list[str] | None:
    """The names that the section at ``path`` may have, or None where that cannot be told."""
    section: Any = draft.spec
    for part in path.split("."):
        section = getattr(section, part, None)
    names = [section.name] if isinstance(getattr(section, "name", None), str) else []
    for parameter_path in (path, f"{path}.name"):
        if not draft.sound(*path.split(".")) or not draft.sound("parameters", parameter_path):
            return None
        parameter = draft.spec.parameters.get(parameter_path)
        if isinstance(parameter, Values):
            values = [v.get("name") if isinstance(v, dict) else v for v in parameter.values]
            names = names if parameter.when else []
            names += [value for value in values if isinstance(value, str)]
    return names


def _value_mistakes(draft: Draft, path: str) -> Iterator[Finding]:
    parameter = draft.spec.parameters[path]
    base: Path = ("parameters", path)
    if isinstance(parameter, Values):
        for index, value in enumerate(parameter.values):
            for finding in refusals(draft, path, value):
                yield _inside(finding, (*base, "values", index))
        return
    takes = [expected(field.rebuild_annotation()) for field in _candidates(draft, path).values()]
    if takes and not any("number" in each for each in takes):
        field = listed(dict.fromkeys(takes))
        yield Finding(
            path=base, message=f"a range must be of numbers, but this is {field}; list the values"
        )
        return
    refused = False
    for name, bound in (("low", parameter.low), ("high", parameter.high)):
        for finding in refusals(draft, path, bound):
            refused = True
            yield _inside(finding, (*base, name))
    if not refused:
        between = (value for value in _inner(parameter) if refusals(draft, path, value))
        for value in between:
            why = refusals(draft, path, value)[0].message
            yield Finding(path=base, message=f"every value of the range {why}")
            return


def _inner(parameter: Range) -> Sequence[int | float]:
    """A few values between the bounds, as the sampler would draw them."""
    low, high, points = parameter.low, parameter.high, parameter.points
    if points is not None:
        return [points[len(points) * part // 4] for part in range(4)]
    return [low + (high - low) * part / 4 for part in range(5)]


def _inside(finding: Finding, base: Path) -> Finding:
    return Finding(path=(*base, *finding.path), message=finding.message, at=finding.at)


def _candidates(
    draft: Draft, path: str, chosen: Point | None = None
) -> dict[type[BaseModel], FieldInfo]:
    """The fields that ``path`` may set, by the variant of its section."""
    parent, _, leaf = path.rpartition(".")
    models = variants(parent) if leaf == "name" else occurring(draft, parent, chosen)
    return {model: model.model_fields[leaf] for model in models if leaf in model.model_fields}


def refusals(draft: Draft, path: str, value: Any, chosen: Point | None = None) -> list[Finding]:
    """Why the field at ``path`` does not take ``value``; [] where one of its variants does.

    The paths are relative to the value.
    """
    parent, _, leaf = path.rpartition(".")
    here = occurring(draft, parent, chosen)
    if any(is_open(model) and leaf not in model.model_fields for model in here):
        return []
    why: list[Finding] = []
    for model in _candidates(draft, path, chosen):
        own = {"name": names_of(model)[0]} if names_of(model) else {}
        try:
            model.model_validate({**own, leaf: value})
            refused = []
        except ValidationError as error:
            refused = [found for found in findings(error, model) if found.path[:1] == (leaf,)]
        if not refused:
            return []
        why = why or [_from_value(found) for found in refused]
    if leaf == "name" and len(variants(parent)) > 1:
        words = [display_name(model) for model in variants(parent)]
        near = did_you_mean(value, words) if isinstance(value, str) else ""
        return [
            Finding(
                path=(), message=f"must be one of {', '.join(words)}, but got {shown(value)}{near}"
            )
        ]
    return why


def _from_value(finding: Finding) -> Finding:
    return Finding(path=finding.path[1:], message=finding.message, at=finding.at)


def _overlaps(draft: Draft) -> Iterator[Finding]:
    for path in draft.spec.parameters:
        if (
            path.endswith(".name")
            and (outer := path.removesuffix(".name")) in draft.spec.parameters
        ):
            yield Finding(
                path=("parameters", path),
                message=f"only one of {outer} and {path} may be a parameter, but both are; "
                f"remove one",
                at="key",
            )


def _condition_mistakes(draft: Draft) -> Iterator[Finding]:
    parameters = draft.spec.parameters
    found = [
        finding
        for path, parameter in parameters.items()
        for parent, options in parameter.when.items()
        for finding in _one_condition(draft, path, parent, options)
    ]
    found += _circles(draft)
    if not found:
        found = [
            Finding(
                path=("parameters", path, "when"),
                message="some trial must meet the conditions, but they contradict each other or "
                "those of the parameters they name",
                at="key",
            )
            for path in parameters
            if requirements(parameters, path) is None
        ]
    yield from found


def _circles(draft: Draft) -> Iterator[Finding]:
    """One finding for each circle of conditions, at the parameter of it that stands first."""
    left = dict(draft.spec.parameters)
    while found := circle(left):
        first = min(found, key=list(left).index)
        at = found.index(first)
        turned = [*found[at:-1], *found[:at], first]
        yield Finding(
            path=("parameters", first, "when"),
            message="conditions must not form a circle, but " + " needs ".join(turned),
            at="key",
        )
        left[first] = left[first].model_copy(update={"when": {}})


def _one_condition(
    draft: Draft, path: str, parent: str, options: Sequence[Any]
) -> Iterator[Finding]:
    where: Path = ("parameters", path, "when", parent)
    parameters = draft.spec.parameters
    if parent not in parameters:
        if draft.sound("parameters", parent):
            yield Finding(path=where, message=_no_parent(draft, parent), at="key")
        return
    allowed = parameters[parent]
    if not options:
        yield Finding(path=where, message="at least one value must be given, but got an empty list")
    elif isinstance(allowed, Range) and allowed.points is None:
        yield Finding(
            path=where,
            message=f"a condition must name values that occur, but {parent} is a continuous range, "
            f"which hardly ever meets one; give it a list of values or a step",
            at="key",
        )
    else:
        for index, option in enumerate(options):
            if not possible(allowed, [option]):
                yield Finding(path=(*where, index), message=_never(allowed, parent, option))


def _no_parent(draft: Draft, parent: str) -> str:
    must = "a condition must name a parameter of this study"
    if path_mistake(draft, parent) is None and not parent.startswith("parameters."):
        return f"{must}, but {parent} is fixed; remove the condition, or make {parent} a parameter"
    return f"{must}, but there is no {shown(parent)}{did_you_mean(parent, draft.spec.parameters)}"


def _never(parameter: Values | Range, parent: str, option: Any) -> str:
    return f"must be a value that {parent} can take, {takes_not(parameter, option)}"


def takes_not(parameter: Values | Range, option: Any) -> str:
    """What a parameter takes and what was there instead, as it follows “must be”."""
    if isinstance(parameter, Values):
        words = [value for value in parameter.values if isinstance(value, str)]
        near = did_you_mean(option, words) if isinstance(option, str) else ""
        takes = listed([str(value) for value in parameter.values[:12]])
        takes += " or another" if len(parameter.values) > 12 else ""
    else:
        near, takes = "", f"from {parameter.low} to {parameter.high}"
        takes += f" in steps of {parameter.step}" if parameter.step else ""
    return f"{takes}, but got {shown(option)}{near}"

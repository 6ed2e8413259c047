"""pydantic's errors → findings: the path as the user wrote it, and a sentence about the value.

No text of pydantic's gets through: what must hold is read off the field's own type, so that a
kind of error nobody thought of still reads like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sweeper.study.describe import advice, expected, listed, literals, shown
from sweeper.study.nodes import Node, Place
from sweeper.study.source import MAX_MISTAKES
from sweeper.study.spec import MAX_PARAMETERS, Objective, ReferenceTrial, StudySpec
from sweeper.study.suggest import did_you_mean
from sweeper.study.variants import display_name, models_in, names_of, parameter_paths

Path = tuple[str | int, ...]

_EXPECTED: Final[dict[Path, str]] = {
    ("objective",): "a metric, a mapping with metric and direction, or a list of these",
    ("parameters",): (
        f"a mapping from at most {MAX_PARAMETERS} dotted paths to lists of values or ranges"
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A mistake whose place is not looked up yet.

    ``at``: what to point to. A missing key is pointed to by its section.
    """

    path: Path
    message: str
    at: Literal["value", "key", "section"] = "value"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spot:
    """Where an error's location leads: the path without tags, the type there, and its owner."""

    path: Path
    annotation: Any
    owner: type[BaseModel] | None
    siblings: tuple[type[BaseModel], ...]


def findings(error: ValidationError, root: type[BaseModel]) -> list[Finding]:
    """What ``error``, raised by ``root``, says, one finding a path.

    The paths are relative to ``root``, without the tags and branches of pydantic's unions.
    """
    by_path: dict[Path, tuple[_Spot, ErrorDetails]] = {}
    for details in error.errors(include_url=False)[:MAX_MISTAKES]:
        spot = _walk(root, details["loc"])
        known = by_path.get(spot.path)
        # Branches of one union; a sentence of our own says more than that a type is wrong.
        if known is None or details["type"] == "value_error":
            by_path[spot.path] = (spot, details)
    return [_finding(spot, details) for spot, details in by_path.values()]


def _walk(root: type[BaseModel], loc: Sequence[str | int]) -> _Spot:
    annotation: Any = root
    path: list[str | int] = []
    owner: type[BaseModel] | None = None
    siblings: tuple[type[BaseModel], ...] = ()
    for part in loc:
        models = models_in(annotation)
        bare = annotation
        while get_origin(bare) is Annotated:
            bare = get_args(bare)[0]
        if len(models) > 1:
            siblings = tuple(models)
            annotation = next((model for model in models if _tagged(model, part)), Any)
        elif models:
            owner = models[0]
            siblings = siblings if owner in siblings else (owner,)
            field = owner.model_fields.get(str(part))
            annotation = field.rebuild_annotation() if field else Any
            path.append(part)
        elif get_origin(bare) is tuple and isinstance(part, int):
            annotation = get_args(bare)[0]
            path.append(part)
        elif get_origin(bare) is dict and part != "[key]":
            annotation = get_args(bare)[1]
            path.append(part)
        # Anything else names the branch of a union, which no user has written.
    return _Spot(path=tuple(path), annotation=annotation, owner=owner, siblings=siblings)


def _tagged(model: type[BaseModel], tag: str | int) -> bool:
    return tag in names_of(model) or tag == model.__name__.lower()


def _finding(spot: _Spot, details: ErrorDetails) -> Finding:
    value, kind = details["input"], details["type"]
    if kind == "value_error":
        return Finding(path=spot.path, message=str(details["ctx"]["error"]))
    if kind == "missing":
        return Finding(
            path=spot.path, message=f"is missing; it must be {_expected(spot)}", at="section"
        )
    if kind == "extra_forbidden":
        return Finding(path=spot.path, message=_unknown(spot), at="key")
    if kind in {"union_tag_invalid", "union_tag_not_found", "model_attributes_type"}:
        return _no_variant(spot, value)
    fix = advice(spot.annotation, value)
    if spot.owner is Objective and isinstance(value, str) and value.startswith("test_"):
        fix = f"; the test set never selects anything, did you mean {'val_' + value[5:]!r}?"
    return Finding(
        path=spot.path, message=f"must be {_expected(spot)}, but got {shown(value)}{fix}"
    )


def _expected(spot: _Spot) -> str:
    path = tuple(part for part in spot.path if not isinstance(part, int))
    if len(spot.path) == 1 and spot.path[0] in ("data", "model"):
        return f"a mapping with a name: {', '.join(literals(spot.annotation))}"
    return _EXPECTED.get(path) or expected(spot.annotation)


def _no_variant(spot: _Spot, value: Any) -> Finding:
    """A section whose ``name`` is missing, or chooses nothing."""
    names = literals(spot.annotation)
    if names == []:
        return _no_parameter(spot, value)
    if not isinstance(value, dict):
        message = f"must be {_expected(spot)}, but got {shown(value)}"
        if isinstance(value, str) and value in names:
            message += f"; write {spot.path[-1]}: {{name: {value}}}"
        return Finding(path=spot.path, message=message)
    path = (*spot.path, "name")
    if "name" not in value:
        return Finding(
            path=path, message=f"is missing; it must be one of {', '.join(names)}", at="section"
        )
    found = value["name"]
    near = did_you_mean(found, names) if isinstance(found, str) else ""
    return Finding(
        path=path, message=f"must be one of {', '.join(names)}, but got {shown(found)}{near}"
    )


def _no_parameter(spot: _Spot, value: Any) -> Finding:
    """An entry of ``parameters`` that is neither a list nor has values, nor low and high."""
    must = "must be a list of values, or a range {low: …, high: …}"
    if isinstance(value, dict):
        keys = [key for key in value if key != "when"]
        near = "".join(did_you_mean(key, ("values", "low", "high")) for key in keys[:1])
        found = f"has only {listed(keys, 'and')}" if keys else f"is {shown(value)}"
        return Finding(path=spot.path, message=f"{must}, but {found}{near}")
    path = str(spot.path[-1])
    section, _, field = path.partition(".")
    fix = f"; a fixed value belongs into the section {section}, as {field}" if field else ""
    return Finding(path=spot.path, message=f"{must}, but got {shown(value)}{fix}")


def _unknown(spot: _Spot) -> str:
    """Why a key cannot stand where it does."""
    key, owner = str(spot.path[-1]), spot.owner
    if owner is None or owner is StudySpec:
        return _unknown_section(key)
    where = str(next((part for part in reversed(spot.path[:-1]) if isinstance(part, str)), ""))
    where = "a reference trial" if owner is ReferenceTrial else where
    if spot.path[0] == "parameters":
        where, others = "a parameter with " + ("values" if key != "values" else "low"), []
        if key in ("low", "high", "step", "log", "values"):
            return f"must not stand beside {'low' if key == 'values' else 'values'}; choose one"
    else:
        others = [m for m in spot.siblings if m is not owner and key in m.model_fields]
    name = display_name(owner) if names_of(owner) else ""
    if others:
        owners = ", ".join(display_name(model) for model in others)
        return f"{key} belongs to {where} {owners}; this {where} is {name}"
    known = [field for field in owner.model_fields if field != "name"]
    near = did_you_mean(key, known)
    if not near and (homes := [p for p in parameter_paths() if p.split(".")[-1] == key]):
        near = f"; did you mean {homes[0]}?" if homes[0].split(".")[0] != spot.path[0] else ""
    title = " ".join(filter(None, (where, name)))
    return (
        f"{title} has no field {shown(key)}{near or '; it has ' + listed(known or ['none'], 'and')}"
    )


def _unknown_section(key: str) -> str:
    known = list(StudySpec.model_fields)
    if key in parameter_paths():
        section, _, field = key.partition(".")
        return (
            f"a dotted path belongs under parameters; a fixed value into its section, "
            f"as {section}: {{{field}: …}}"
        )
    near = did_you_mean(key, known)
    homes = [path for path in (*parameter_paths(), "search.trials") if path.endswith("." + key)]
    if not near and homes:
        near = f"; did you mean {homes[0]}?"
    return f"there is no section {shown(key)}{near or '; there are ' + listed(known, 'and')}"


def place_of(root: Node, finding: Finding) -> tuple[Place, Path]:
    """Where ``finding`` is in the file, and its path as the file spells it.

    The spec holds a list of objectives where a file may have one, a mapping where it may have a
    list of values, and a mapping with a name where it may have the name alone.
    """
    node, key_place = root, root.place
    path: list[str | int] = []
    last = len(finding.path) - 1
    for index, part in enumerate(finding.path):
        named_by_list = part == "values" and isinstance(node.value, tuple)
        if named_by_list or (isinstance(part, int) and not isinstance(node.value, tuple)):
            continue
        child = node.child(part)
        if child is None:
            if finding.at == "section":
                return key_place, (*path, *finding.path[index:])
            known = index == last and isinstance(node.value, dict)
            return node.place, (*path, part) if known else tuple(path)
        key_place = node.keys.get(str(part), child.place)
        node = child
        path.append(part)
    return (key_place if finding.at == "key" else node.place), tuple(path)


def spelled(path: Path) -> str:
    """``path`` as text: dotted, with indices in brackets."""
    text = ""
    for part in path:
        word = part if isinstance(part, int) or len(part) <= 60 else part[:57] + "…"
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{word}"
    return text

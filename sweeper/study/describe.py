"""What a field takes and what was found there, in plain English."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal, TypeGuard, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sweeper.study.cluster import SHELL_LINE, SLURM_FLAG, SLURM_NAME, SLURM_TIME
from sweeper.study.suggest import did_you_mean
from sweeper.study.variants import is_open, names_of

_PATTERNS: Final = {
    r"^(\d+(\.\d+)?|\.\d+)[CN]$": "a multiple of C or N such as 0.5C",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$": (
        "a name of at most 100 letters, digits, '.', '_' and '-' that begins with a letter or digit"
    ),
    r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$": "a factory such as package.module:factory",
    SLURM_NAME: "a name of the cluster's: letters, digits, '.', '_', '-', '@', '+' and ','",
    SLURM_TIME: "a time such as 4:00:00 or 2-12:00:00",
    SLURM_FLAG: "an option of sbatch such as --constraint=a100",
    SHELL_LINE: "a line of shell",
}

_INSTEAD: Final = {True: ("on", "auto", "both"), False: ("off", "none"), None: ("none", "off")}
"""Words that somebody may have meant who wrote true, false or nothing."""


def listed(words: Iterable[str], last: str = "or") -> str:
    """``a, b or c``."""
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end


def expected(annotation: Any) -> str:
    """What a value of ``annotation`` is, as it follows “must be”."""
    words: list[str] = []
    names: list[str] = []
    phrases: list[str] = []
    for part, limits in _members(annotation, ()):
        if get_origin(part) is Literal:
            words += [str(word) for word in get_args(part)]
        elif _is_model(part) and names_of(part):
            names += names_of(part)
        else:
            phrases.append(_phrase(part, limits))
    if words:
        phrases.insert(0, f"one of {', '.join(words)}" if len(words) > 1 else words[0])
    if names:
        phrases.insert(0, f"one of {', '.join(names)}, or a mapping with such a name")
    if "a number" in phrases:
        phrases = [phrase for phrase in phrases if phrase != "a whole number"]
    return listed(dict.fromkeys(phrases))


def _is_model(part: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _members(annotation: Any, limits: Sequence[Any]) -> list[tuple[Any, Sequence[Any]]]:
    """The members of a union, each with the constraints that hold for it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        flat = [
            limit
            for each in more
            for limit in (each.metadata if isinstance(each, FieldInfo) else [each])
        ]
        return _members(inner, [*limits, *flat])
    if origin in (Union, types.UnionType):
        return [found for part in get_args(annotation) for found in _members(part, limits)]
    return [(annotation, limits)]


def _phrase(part: Any, limits: Sequence[Any]) -> str:
    """One member of a union."""
    simple = {None: "null", type(None): "null", bool: "true or false"}
    if part in simple:
        return simple[part]
    if part in (int, float):
        return " ".join(["a whole number" if part is int else "a number", *_bounds(limits)])
    if part is str:
        pattern = next((p for each in limits if (p := getattr(each, "pattern", None))), None)
        if pattern is not None:
            return _PATTERNS.get(str(pattern), f"text that matches {pattern}")
        return "text" if not any(isinstance(each, MinLen) for each in limits) else "non-empty text"
    if get_origin(part) in (tuple, list):
        return _list_phrase(part, limits)
    return "a mapping" if get_origin(part) is dict or _is_model(part) else "a value"


def _list_phrase(part: Any, limits: Sequence[Any]) -> str:
    least = next((limit.min_length for limit in limits if isinstance(limit, MinLen)), 0)
    most = next((limit.max_length for limit in limits if isinstance(limit, MaxLen)), None)
    if most == 0:
        return "an empty list"
    of = expected(get_args(part)[0])
    each = "" if of == "a value" else f", each {of}"
    size = " of at least one" if least == 1 and most is None else ""
    size = f" of {least} to {most:,} values" if most else size
    return f"a list{size}{each}"


def _bounds(limits: Sequence[Any]) -> list[str]:
    low: tuple[str, Any] | None = None
    high: tuple[str, Any] | None = None
    for limit in limits:
        match limit:
            case Ge(ge=bound):
                low = ("of at least", bound)
            case Gt(gt=bound):
                low = ("above", bound)
            case Le(le=bound):
                high = ("of at most", bound)
            case Lt(lt=bound):
                high = ("below", bound)
    if low and high and (low[0], high[0]) == ("of at least", "of at most"):
        return [f"from {low[1]} to {high[1]}"]
    words = [f"{word} {bound}" for word, bound in filter(None, (low, high))]
    return [" and ".join(words)] if words else []


def literals(annotation: Any) -> list[str]:
    """The words that ``annotation`` takes: of its literals, and names of its variants."""
    found: list[str] = []
    for part, _ in _members(annotation, ()):
        if get_origin(part) is Literal:
            found += [str(word) for word in get_args(part)]
        elif _is_model(part):
            found += names_of(part)
            if is_open(part):
                found.append("package.module:factory")
        elif get_origin(part) in (tuple, list):
            found += literals(get_args(part)[0])
    return found


def shown(value: Any) -> str:
    """``value`` as it follows “but got”."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "…")
        case list() | tuple():
            return "a list" if value else "an empty list"
        case dict():
            return "a mapping" if value else "an empty mapping"
        case _:
            return type(value).__name__


def advice(annotation: Any, value: Any) -> str:
    """What to write instead of ``value``, as the end of a sentence; nothing where unknown."""
    takes = {part for part, _ in _members(annotation, ())}
    words = literals(annotation)
    if isinstance(value, bool) or value is None:
        meant = next((word for word in _INSTEAD[value] if word in words), None)
        return f"; did you mean {meant!r}?" if meant else ""
    if isinstance(value, float) and value.is_integer() and int in takes and float not in takes:
        return f"; write {int(value)}"
    if isinstance(value, str) and takes & {int, float}:
        number = _number(value)
        if number is not None and (float in takes or isinstance(number, int)):
            return f"; write {number} without quotes, blanks or underscores"
    if isinstance(value, str):
        return did_you_mean(value, words)
    return ""


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text.replace("_", "").replace(" ", ""))
        except ValueError:
            continue
    return None

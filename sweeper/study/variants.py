"""Which fields a named variant of a section has: every model, data set and schedule."""

from __future__ import annotations

import types
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from sweeper.config import TrialConfig


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside ``Annotated`` and unions."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [model for part in get_args(annotation) for model in _models(part)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return []


@cache
def variants(path: str) -> tuple[type[BaseModel], ...]:
    """The models that may stand at the dotted ``path`` of a trial's sections; () for none."""
    found: list[type[BaseModel]] = [TrialConfig]
    for part in path.split("."):
        found = [
            child
            for model in found
            if part in model.model_fields
            for child in _models(model.model_fields[part].rebuild_annotation())
        ]
    return tuple(dict.fromkeys(found))


@cache
def fields_of(path: str, name: str) -> frozenset[str] | None:
    """The fields of the variant called ``name`` at ``path``, or None where there is none."""
    for model in variants(path):
        field = model.model_fields.get("name")
        if field is not None and name in get_args(field.annotation):
            return frozenset(model.model_fields)
    return None

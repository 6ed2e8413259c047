"""What may stand where in a study file: the fields of every section and of its named variants.

Read off the pydantic models, so that a new model, data set or sampler needs no second entry.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sweeper.study.spec import SECTIONS, StudySpec


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside ``Annotated`` and unions."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return models_in(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [model for part in get_args(annotation) for model in models_in(part)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return []


def names_of(model: type[BaseModel]) -> tuple[str, ...]:
    """The names under which ``model`` is chosen among its variants; () where it has no fixed one.

    A ``name`` with several values (the optimizer's) is an ordinary field, and chooses no variant.
    """
    field = model.model_fields.get("name")
    if field is None or get_origin(field.annotation) is not Literal:
        return ()
    names = get_args(field.annotation)
    return names if len(names) == 1 else ()


def is_open(model: type[BaseModel]) -> bool:
    """Whether ``model`` takes fields of any name: a factory of the user's own."""
    return model.model_config.get("extra") == "allow"


@cache
def variants(path: str) -> tuple[type[BaseModel], ...]:
    """The models that may stand at the dotted ``path`` of a study file; () for none."""
    found: list[type[BaseModel]] = [StudySpec]
    for part in path.split(".") if path else ():
        found = [
            child
            for model in found
            if part in model.model_fields
            for child in models_in(model.model_fields[part].rebuild_annotation())
        ]
    return tuple(dict.fromkeys(found))


def variant(path: str, name: str) -> type[BaseModel] | None:
    """The model that ``name`` chooses at ``path``, or None where it chooses none."""
    models = variants(path)
    if len(models) == 1:
        return models[0]
    for model in models:
        if name in names_of(model) or (is_open(model) and ":" in name):
            return model
    return None


@cache
def fields_of(path: str, name: str) -> frozenset[str] | None:
    """The fields of the variant called ``name`` at ``path``, or None where there is none."""
    model = variant(path, name)
    return None if model is None else frozenset(model.model_fields)


def foreign_fields(path: str, section: Mapping[str, Any], name: str) -> list[str]:
    """The keys of ``section`` that its variant has and the variant called ``name`` has not.

    A key that neither knows stays: it is a mistake, and to be named as one.
    """
    former, new = variant(path, str(section.get("name"))), variant(path, name)
    if former is None or new is None or former is new:
        return []
    return [
        key
        for key in section
        if key not in new.model_fields and (key in former.model_fields or is_open(former))
    ]


def fields_at(path: str) -> list[tuple[type[BaseModel], FieldInfo]]:
    """The fields that the dotted ``path`` may name, each with the variant it belongs to."""
    parent, _, leaf = path.rpartition(".")
    return [
        (model, model.model_fields[leaf])
        for model in variants(parent)
        if leaf in model.model_fields
    ]


def display_name(model: type[BaseModel]) -> str:
    """What a user calls a variant."""
    return names_of(model)[0] if names_of(model) else "package.module:factory"


def default_name(path: str) -> str | None:
    """The variant that stands at ``path`` where the file says nothing, or None for none."""
    for _, field in fields_at(path):
        name = getattr(field.get_default(call_default_factory=False), "name", None)
        if isinstance(name, str):
            return name
    return None


@cache
def parameter_paths() -> tuple[str, ...]:
    """Every dotted path that a parameter may have, in the order of the sections."""
    return tuple(dict.fromkeys(path for section in SECTIONS for path in _paths_below(section)))


def _paths_below(path: str) -> Iterable[str]:
    for model in variants(path):
        for name in model.model_fields:
            inner = f"{path}.{name}"
            yield inner
            yield from _paths_below(inner)

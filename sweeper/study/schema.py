"""The JSON Schema (draft 2020-12) of study files, for completion and hints in an editor.

It knows every section, field, word and short form, and which dotted paths a parameter may have.
What only a look at several sections tells, `sweeper.study.parse` checks.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel

from sweeper.study.spec import StudySpec
from sweeper.study.variants import fields_at, names_of, parameter_paths, variants

Schema = dict[str, Any]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_FACTORY_PATHS: Final = r"^model\.[A-Za-z_]\w*$"
_ANY_PARAMETER: Final = {"$ref": "#/$defs/AnyParameter"}


def json_schema() -> Schema:
    """The schema as plain data."""
    schema = StudySpec.model_json_schema()
    definitions: dict[str, Schema] = schema["$defs"]
    for model in _models(StudySpec, set()):
        _describe(schema if model is StudySpec else definitions[model.__name__], model)
    _tidy(schema)
    _add_short_forms(schema)
    _add_parameters(schema)
    return {"$schema": DIALECT, **schema, "title": "A study file of sweeper"}


def _models(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """``model`` and all that its fields may hold."""
    if model in seen:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        for inner in _classes_in(field.rebuild_annotation()):
            yield from _models(inner, seen)


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _classes_in(inner)


def _describe(schema: Schema, model: type[BaseModel]) -> None:
    """Give each field the sentences that docstrings of its class say about it."""
    sentences = [
        sentence
        for ancestor in model.__mro__
        if ancestor is not BaseModel and issubclass(ancestor, BaseModel) and ancestor.__doc__
        for sentence in re.split(r"(?<=\.)\s+(?=[A-Z`])", inspect.cleandoc(ancestor.__doc__))
    ]
    for name, field in schema.get("properties", {}).items():
        own = [each for each in sentences if re.match(rf"``{name}(``|:)", each)]
        about = own or [each for each in sentences if re.search(rf"``{name}(``|:)", each)]
        if about:
            field["description"] = _plain(" ".join(dict.fromkeys(about)))
    if model.__doc__:
        schema["description"] = _plain(inspect.cleandoc(model.__doc__))
    if names_of(model):
        required = schema.setdefault("required", [])
        required[:] = dict.fromkeys(["name", *required])


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("``", "'"))


def _tidy(node: Any) -> None:
    """Remove what says nothing: generated titles, and OpenAPI's discriminators."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        if "oneOf" in node:
            node.pop("discriminator", None)
        for inner in node.values():
            _tidy(inner)
    elif isinstance(node, list):
        for inner in node:
            _tidy(inner)


def _add_short_forms(schema: Schema) -> None:
    """A name alone for sampler, pruner, schedule and augmentations; an objective's metric."""
    definitions = schema["$defs"]
    for owner, field in (
        ("Search", "sampler"),
        ("Search", "pruner"),
        ("OptimizerConfig", "schedule"),
    ):
        _name_alone(definitions[owner]["properties"][field], definitions)
    for model in variants("data"):
        _name_alone(definitions[model.__name__]["properties"]["augment"]["items"], definitions)
    objective = schema["properties"]["objective"]
    one = [{"enum": definitions["Objective"]["properties"]["metric"]["enum"]}]
    one.append({"$ref": "#/$defs/Objective"})
    several = {"type": "array", "items": {"anyOf": one}, "minItems": 1}
    for keyword in ("type", "items", "minItems", "minLength"):
        objective.pop(keyword, None)
    objective["anyOf"] = [*one, several]


def _name_alone(field: Schema, definitions: Mapping[str, Schema]) -> None:
    choices = field.pop("oneOf")
    names = [
        definitions[choice["$ref"].rpartition("/")[2]]["properties"]["name"]["const"]
        for choice in choices
    ]
    field["anyOf"] = [{"enum": names}, *choices]


def _add_parameters(schema: Schema) -> None:
    """The dotted paths a parameter may have, each with the values that its field takes."""
    definitions = schema["$defs"]
    condition = {"description": "One value or a list of them, of which the other parameter has one"}
    definitions["When"] = {
        "type": "object",
        "description": "The other parameters' values under which this one holds.",
        "additionalProperties": condition,
    }
    definitions["AnyParameter"] = _parameter({}, {"type": "number"})
    fields = {path: _field(path, definitions) for path in parameter_paths()}
    parameters = schema["properties"]["parameters"]
    parameters["description"] = "Dotted paths into data, model, optimizer and train: what varies."
    parameters["properties"] = {
        path: {**_parameter(field, _numeric(field)), "description": field.get("description", path)}
        for path, field in fields.items()
    }
    parameters["patternProperties"] = {_FACTORY_PATHS: _ANY_PARAMETER}
    parameters["additionalProperties"] = False
    params = definitions["ReferenceTrial"]["properties"]["params"]
    params["properties"] = fields
    params["patternProperties"] = {_FACTORY_PATHS: {}}
    params["additionalProperties"] = False
    definitions.pop("Values")
    definitions.pop("Range")
    # Arguments of a factory have names of its own: only where there is one are they allowed.
    own_model = {"properties": {"name": {"pattern": ":"}}, "required": ["name"]}
    schema["if"] = {
        "anyOf": [
            {"properties": {"model": own_model}, "required": ["model"]},
            {
                "properties": {"parameters": {"required": ["model.name"]}},
                "required": ["parameters"],
            },
        ]
    }
    schema["else"] = {"properties": {"parameters": {"propertyNames": {"enum": list(fields)}}}}


def _field(path: str, definitions: Mapping[str, Schema]) -> Schema:
    """What the field at ``path`` takes, whichever variant of its section it belongs to."""
    found: dict[str, Schema] = {}
    about: dict[str, None] = {}
    for model, _ in fields_at(path):
        field = dict(definitions[model.__name__]["properties"][path.rpartition(".")[2]])
        field.pop("default", None)
        if description := field.pop("description", None):
            about[description] = None
        for choice in field.get("anyOf", [field]):
            found.setdefault(json.dumps(choice, sort_keys=True), choice)
    field = next(iter(found.values())) if len(found) == 1 else {"anyOf": list(found.values())}
    return {**field, "description": " ".join(about)} if about else field


def _numeric(field: Schema) -> Schema | None:
    """The part of a field's schema that takes numbers, or None where it takes none."""
    numbers = [
        choice
        for choice in field.get("anyOf", [field])
        if choice.get("type") in ("integer", "number")
    ]
    if not numbers:
        return None
    return numbers[0] if len(numbers) == 1 else {"anyOf": numbers}


def _parameter(field: Schema, number: Schema | None) -> Schema:
    """A list of values, a mapping with values, or (where there are numbers) a range."""
    value = {key: inner for key, inner in field.items() if key != "description"}
    values = {"type": "array", "items": value, "minItems": 1, "uniqueItems": True}
    when = {"$ref": "#/$defs/When"}
    forms: list[Schema] = [
        values,
        {
            "type": "object",
            "properties": {"values": values, "when": when},
            "required": ["values"],
            "additionalProperties": False,
        },
    ]
    if number is not None:
        number = {key: inner for key, inner in number.items() if key != "description"}
        step = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}
        bounds = {"low": number, "high": number, "log": {"type": "boolean"}, "step": step}
        forms.append(
            {
                "type": "object",
                "properties": {**bounds, "when": when},
                "required": ["low", "high"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": forms}

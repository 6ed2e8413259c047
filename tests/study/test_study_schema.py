"""The JSON Schema says of files what the checks say, as far as one section tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sweeper.study.spec
from sweeper.errors import StudyFileError
from sweeper.study.parse import loads
from sweeper.study.schema import DIALECT, json_schema
from sweeper.study.source import compose
from sweeper.study.variants import parameter_paths

TEMPLATE = Path(sweeper.study.spec.__file__).with_name("template.yaml")
STUDIES = sorted(Path(__file__).parents[2].glob("studies/*.yaml"))
SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def data_of(text: str) -> Any:
    root, mistakes = compose(text, "study.yaml")
    assert root is not None, mistakes
    return root.data


def valid(data: Any) -> bool:
    return bool(VALIDATOR.is_valid(data))


def small(**sections: Any) -> dict[str, Any]:
    base = {"name": "s", "data": {"name": "digits"}, "model": {"name": "mixer"}}
    return {**base, "search": {"trials": 1}, **sections}


def test_it_is_a_json_schema_and_plain_json() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == DIALECT
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("file", [TEMPLATE, *STUDIES], ids=lambda file: file.name)
def test_the_studies_of_the_project_validate(file: Path) -> None:
    errors = [error.message for error in VALIDATOR.iter_errors(data_of(file.read_text()))]
    assert errors == []


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"objective": "val_loss"},
        {"objective": ["val_loss", {"metric": "seconds", "direction": "minimize"}]},
        {"search": {"sampler": "grid", "pruner": "none"}},
        {"search": {"sampler": {"name": "gp", "startup_trials": 3}, "trials": 3}},
        {"optimizer": {"schedule": "cosine", "eps": None}},
        {"optimizer": {"schedule": {"name": "exponential", "gamma": 0.5}}},
        {"data": {"name": "cifar10", "augment": ["flip", {"name": "crop", "padding": 2}]}},
        {"model": {"name": "package.module:factory", "depth": [1, 2], "init": "orthogonal"}},
        {"model": {"name": "mixer", "token_hidden": "0.5C", "channel_hidden": 512}},
        {"parameters": {"optimizer.lr": [0.1, 0.01]}},
        {"parameters": {"optimizer.lr": {"values": [0.1], "when": {"optimizer.name": "adam"}}}},
        {"parameters": {"model.blocks": {"low": 1, "high": 9, "step": 2, "when": {"a": [1]}}}},
        {"parameters": {"optimizer.lr": {"low": 0.1, "high": 1, "step": None}}},
        {"parameters": {"optimizer.schedule": ["constant", {"name": "plateau"}]}},
        {"parameters": {"data.augment": [[], ["crop"]]}},
        {"parameters": {"model.name": ["mlp", "pkg.mod:f"], "model.anything": [1]}},
        {"model": {"name": "a:b"}, "parameters": {"model.depth": {"low": 1, "high": 3}}},
        {"reference": {"source": "r", "trials": [{"params": {"optimizer.lr": 0.1}}]}},
    ],
)
def test_short_and_long_forms_validate(sections: dict[str, Any]) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(small(**sections))] == []


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "my study"},
        {"naem": "s"},
        {"data": {"name": "cifar"}},
        {"data": "cifar10"},
        {"data": {"name": "circles", "augment": ["flip"]}},
        {"model": {"patch": 4}},
        {"model": {"name": "mixer", "pach": 4}},
        {"model": {"name": "mlp", "patch": 4}},
        {"model": {"name": "mixer", "patch": 4.5}},
        {"model": {"name": "mixer", "skip": "yes"}},
        {"optimizer": {"lr": 0}},
        {"optimizer": {"schedule": "cosin"}},
        {"objective": "test_accuracy"},
        {"objective": []},
        {"search": {"trials": 0}},
        {"search": {"sampler": {"startup_trials": 3}}},
        {"search": {"pruner": "medain"}},
        {"parameters": {"model.pach": [1]}},
        {"parameters": {"lr": [0.1]}},
        {"parameters": {"optimizer.lr": 0.1}},
        {"parameters": {"optimizer.lr": []}},
        {"parameters": {"optimizer.lr": [-0.1]}},
        {"parameters": {"optimizer.lr": {"low": 0.1}}},
        {"parameters": {"optimizer.lr": {"low": 0.1, "high": 1, "values": [1]}}},
        {"parameters": {"optimizer.lr": {"low": 0.1, "high": 1, "step": 0}}},
        {"parameters": {"train.loss": {"low": 0, "high": 1}}},
        {"parameters": {"optimizer.name": ["adm"]}},
        {"model": {"name": "a:b"}, "parameters": {"optimizer.depth": [1]}},
        {"reference": {"trials": []}},
        {"reference": {"source": "r", "trials": [{"params": {"optimizer.lrr": 1}}]}},
        {"resources": {"workers": "many"}},
    ],
)
def test_broken_files_do_not_validate(sections: dict[str, Any]) -> None:
    assert not valid(small(**sections))


def test_every_field_is_described_and_every_path_listed() -> None:
    for name, definition in [("", SCHEMA), *SCHEMA["$defs"].items()]:
        for field, schema in definition.get("properties", {}).items():
            if field != "name":
                assert schema.get("description"), f"{name}.{field}"
    parameters = SCHEMA["properties"]["parameters"]["properties"]
    assert list(parameters) == list(parameter_paths())
    assert all("``" not in schema["description"] for schema in parameters.values())


def test_names_are_enumerated_for_completion() -> None:
    sampler = SCHEMA["$defs"]["Search"]["properties"]["sampler"]
    assert {"tpe", "grid"} < set(sampler["anyOf"][0]["enum"])
    augment = SCHEMA["$defs"]["Cifar10"]["properties"]["augment"]["items"]
    assert set(augment["anyOf"][0]["enum"]) >= {"crop", "flip"}


@pytest.mark.parametrize("metric", SCHEMA["$defs"]["Objective"]["properties"]["metric"]["enum"])
def test_the_defaults_of_an_objective_are_what_a_file_without_them_gets(metric: str) -> None:
    objective = loads(json.dumps(small(objective={"metric": metric}))).objective[0]
    for field, schema in SCHEMA["$defs"]["Objective"]["properties"].items():
        if field != "metric" and "default" in schema:
            assert getattr(objective, field) == schema["default"]


WORDS = st.sampled_from(["mixer", "mlp", "flip", "cosine", "tpe", "adam", "auto", "0.5C", "a:b"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 99) | st.floats(-1, 2) | WORDS,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(parameter_paths()), st.lists(JSON, min_size=1, max_size=3), JSON)
def test_what_the_checks_let_through_validates(path: str, values: list[Any], value: Any) -> None:
    """The schema may be laxer than the checks, and is never stricter."""
    section, _, field = path.partition(".")
    candidates = [small(parameters={path: values}), small(parameters={path: {"values": values}})]
    if section in ("optimizer", "train") and "." not in field:
        candidates.append(small(**{section: {field: value}}))
    for data in candidates:
        try:
            loads(json.dumps(data))
        except StudyFileError:
            continue
        assert valid(data), data

"""Values that a person types for a trial: all that is wrong is said, and what is left is the
sampler's."""

from __future__ import annotations

from typing import Any

import pytest

from sweeper.errors import UsageError
from sweeper.study.point import still_open, typed_point
from sweeper.study.spec import StudySpec

PARAMETERS: dict[str, Any] = {
    "model.name": ["vit", "mlp"],
    "model.heads": {"values": [2, 4], "when": {"model.name": "vit"}},
    "model.embed_dim": {"values": [32, 36], "when": {"model.name": "vit"}},
    "model.dropout": {"low": 0.0, "high": 0.5, "step": 0.1},
    "optimizer.lr": {"low": 1.0e-4, "high": 0.1, "log": True},
    "train.batch_size": {"low": 32, "high": 128, "step": 32},
    "data.standardize": ["none", "channel"],
}


@pytest.fixture
def spec() -> StudySpec:
    return StudySpec.model_validate(
        {
            "name": "mixed",
            "data": {"name": "mnist"},
            "model": {"name": "mlp"},
            "search": {"trials": 3},
            "parameters": PARAMETERS,
        }
    )


def test_values_are_what_the_sampler_would_have_drawn(spec: StudySpec) -> None:
    words = ["optimizer.lr=1e-3", "model.dropout = 0.30000000000000004", "train.batch_size=64.0"]
    point = typed_point(spec, words)
    assert point == {"optimizer.lr": 0.001, "model.dropout": 0.3, "train.batch_size": 64}
    assert list(point) == ["model.dropout", "optimizer.lr", "train.batch_size"]
    assert isinstance(point["train.batch_size"], int)
    assert isinstance(typed_point(spec, ["model.dropout=0"])["model.dropout"], float)


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], ["model.name", "model.heads", "model.embed_dim"]),
        (["model.name=mlp"], []),
        (["model.name=vit", "model.heads=4"], ["model.embed_dim"]),
    ],
)
def test_the_rest_is_the_samplers(spec: StudySpec, words: list[str], left: list[str]) -> None:
    others = ["model.dropout=0.1", "optimizer.lr=0.01", "train.batch_size=32"]
    point = typed_point(spec, [*words, *others, "data.standardize=channel"])
    assert still_open(spec, point) == left


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optimizer.lr", "must be typed as path=value, but got 'optimizer.lr'"),
        ("=3", "must be typed as path=value"),
        ("optimizer.lrs=3", "did you mean 'optimizer.lr'?"),
        ("optimizer.lr=1", "must be from 0.0001 to 0.1, but got 1"),
        ("optimizer.lr=true", "must be from 0.0001 to 0.1, but got true"),
        ("optimizer.lr=", "optimizer.lr must be from 0.0001 to 0.1, but got nothing"),
        ("optimizer.lr=[1", "optimizer.lr must be YAML"),
        ("model.name=cnn", "model.name must be vit or mlp, but got 'cnn'"),
        ("model.name=mpl", "but got 'mpl'; did you mean 'mlp'?"),
        ("model.heads=2", "only where model.name is 'vit'; give that"),
        ("model.dropout=0.25", "from 0.0 to 0.5 in steps of 0.1, but got 0.25"),
        ("train.batch_size=100", "must be from 32 to 128 in steps of 32, but got 100"),
    ],
)
def test_what_no_trial_can_have_is_named(spec: StudySpec, word: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"must be|only where") as error:
        typed_point(spec, [word])
    assert said in str(error.value)


def test_all_that_is_wrong_is_said_at_once(spec: StudySpec) -> None:
    words = ["optimizer.lr=1", "model.heads=2", "model.name=mlp", "model.name=vit", "x=1"]
    with pytest.raises(UsageError) as error:
        typed_point(spec, words)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "model.name must be given once, but is there twice" in lines


def test_whole_points_must_fit_together(spec: StudySpec) -> None:
    whole = ["model.name=vit", "model.heads=4", "model.dropout=0", "optimizer.lr=0.01"]
    whole += ["train.batch_size=32", "data.standardize=none"]
    assert typed_point(spec, [*whole, "model.embed_dim=32"])
    wide = {**PARAMETERS, "model.embed_dim": {"values": [30], "when": {"model.name": "vit"}}}
    odd = StudySpec.model_validate({**spec.model_dump(mode="json"), "parameters": wide})
    with pytest.raises(UsageError, match=r"no trial can have these values: .*heads"):
        typed_point(odd, [*whole, "model.embed_dim=30"])


def test_a_study_without_parameters_has_nothing_to_choose() -> None:
    spec = StudySpec.model_validate(
        {"name": "one", "data": {"name": "digits"}, "model": {"name": "mlp"}}
    )
    with pytest.raises(UsageError, match="a parameter of 'one', but it has none"):
        typed_point(spec, ["optimizer.lr=0.1"])

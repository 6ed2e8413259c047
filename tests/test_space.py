"""The search space: what a parameter is, and which points a space has."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from sweeper.grid import grid, grid_size
from sweeper.space import (
    Parameter,
    Range,
    Values,
    circle,
    contains,
    draw,
    encode,
    ordered,
    position,
    requirements,
    same,
    structural,
)
from sweeper.study.variants import parameter_paths

SPACE: TypeAdapter[dict[str, Values | Range]] = TypeAdapter(dict[str, Parameter])


def space(**parameters: Any) -> dict[str, Values | Range]:
    return SPACE.validate_python(parameters)


def conditional() -> dict[str, Values | Range]:
    return space(
        a=["x", "y", "z"],
        b={"values": [1, 2], "when": {"a": ["x", "y"]}},
        c={"low": 1, "high": 5, "when": {"b": 1}},
        d=[True, False],
    )


def test_a_list_stands_for_values_and_one_value_for_a_condition() -> None:
    parameters = space(a=[1, 2], b={"low": 0.5, "high": 2, "when": {"a": 1}})
    assert parameters["a"] == Values(values=(1, 2))
    assert parameters["b"].when == {"a": (1,)}


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"low": 2, "high": 1}, "low <= high must hold, but got low=2, high=1"),
        ({"low": 1, "high": 0.5}, "low <= high must hold, but got low=1, high=0.5"),
        ({"low": 0, "high": 1, "log": True}, "low > 0 must hold where log is true"),
        ({"low": 1, "high": 2, "step": 0}, "step > 0 must hold"),
        ({"low": 1, "high": 2, "step": 1, "log": True}, "step and log exclude each other"),
        ({"low": 1, "high": 2, "step": 0.5}, "write low as 1.0"),
        ({"low": 0.0, "high": 1e9, "step": 1e-9}, "at most 100,000 points"),
        ({"low": -(2**62), "high": 2**62}, "high - low < 2^53 must hold"),
        ({"low": -1.7e308, "high": 1.7e308}, "high - low < 2^53 must hold"),
        ([1, 2, 1.0], "1.0 is there twice"),
        ([[1], [1]], "is there twice"),
        ([], "at least 1"),
        (list(range(1001)), "at most 1000"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(parameter: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("(", r"\(").replace("^", r"\^")):
        space(p=parameter)


def test_true_is_not_one_and_a_tuple_is_a_list() -> None:
    assert same(1, 1.0)
    assert same([1, {"a": (2,)}], (1.0, {"a": [2]}))
    assert not same(True, 1)
    assert not same("1", 1)
    assert not same([1], "[1]")
    assert space(p=[True, 1])["p"] == Values(values=(True, 1))
    assert position(Values(values=(True, 1)), 1) == 1


def test_encode_makes_scalars_of_lists_and_mappings() -> None:
    assert [encode(value) for value in (None, True, 2, 0.5, "a")] == [None, True, 2, 0.5, "a"]
    assert encode([1, "b"]) == '[1,"b"]'
    assert encode({"b": 1, "a": 2}) == '{"a":2,"b":1}'


def test_points_of_a_range() -> None:
    assert list(Range(low=1, high=7, step=3).points or ()) == [1, 4, 7]
    assert tuple(Range(low=0.1, high=0.3, step=0.1).points or ()) == (0.1, 0.2, 0.3)
    assert tuple(Range(low=1, high=2.5, step=1).points or ()) == (1.0, 2.0)
    assert Range(low=0.5, high=0.5).points == (0.5,)
    assert Range(low=0.5, high=0.6).points is None
    assert len(Range(low=0, high=2**50).points or ()) == 2**50 + 1


@pytest.mark.parametrize(
    ("parameter", "value", "inside"),
    [
        (Range(low=1, high=7, step=3), 4, True),
        (Range(low=1, high=7, step=3), 4.0, True),
        (Range(low=1, high=7, step=3), 5, False),
        (Range(low=1, high=7), 4.5, False),
        (Range(low=1, high=7), True, False),
        (Range(low=0.1, high=0.3, step=0.1), 0.1 + 0.1 + 0.1, False),  # above high
        (Range(low=0.1, high=0.3, step=0.1), 0.3, True),
        (Range(low=0.1, high=0.3, step=0.1), 0.25, False),
        (Range(low=0.1, high=0.3), 0.25, True),
        (Range(low=0.1, high=0.3), "0.25", False),
        (Values(values=("a", [1, 2])), [1, 2], True),
        (Values(values=("a", 1)), True, False),
    ],
)
def test_contains(parameter: Values | Range, value: object, inside: bool) -> None:
    assert contains(parameter, value) is inside


def test_parents_come_before_what_needs_them_and_else_the_order_stays() -> None:
    parameters = space(
        c={"values": [1, 2], "when": {"b": 1}},
        a=[1, 2],
        b={"values": [1, 2], "when": {"a": 1, "missing": 3}},
    )
    assert ordered(parameters) == ["a", "b", "c"]


def test_a_circle_of_conditions_is_named() -> None:
    parameters = space(
        a=[1, 2],
        b={"values": [1, 2], "when": {"c": 1}},
        c={"values": [1, 2], "when": {"b": 1}},
    )
    assert circle(parameters) == ["b", "c", "b"]
    with pytest.raises(ValueError, match="b needs c needs b"):
        ordered(parameters)


def test_a_chain_of_thousands_of_conditions_is_no_problem() -> None:
    parameters = space(
        **{
            f"p{i}": {"values": [1, 2], "when": {f"p{i + 1}": 1} if i < 2999 else {}}
            for i in range(3000)
        }
    )
    assert ordered(parameters)[0] == "p2999"
    assert grid_size(parameters) == 3001
    assert sum(1 for _ in itertools.islice(grid(parameters), 5)) == 5


def test_the_grid_observes_conditions_with_the_last_parameter_fastest() -> None:
    points = list(grid(conditional()))
    assert points[:3] == [
        {"a": "x", "b": 1, "c": 1, "d": True},
        {"a": "x", "b": 1, "c": 1, "d": False},
        {"a": "x", "b": 1, "c": 2, "d": True},
    ]
    assert points[-1] == {"a": "z", "d": False}
    assert len(points) == 2 * (5 + 1) * 2 + 2
    assert len({repr(sorted(point.items())) for point in points}) == len(points)


def test_the_grid_of_no_parameters_is_one_point() -> None:
    assert list(grid({})) == [{}]
    assert grid_size({}) == 1


def test_a_continuous_range_has_no_grid() -> None:
    with pytest.raises(ValueError, match="p: a grid needs a list of values or a step"):
        grid(space(p={"low": 0.1, "high": 1}))
    with pytest.raises(ValueError, match="p: a grid needs"):
        grid_size(space(p={"low": 0.1, "high": 1}))


def test_a_huge_grid_is_counted_without_walking_it() -> None:
    parameters = space(**{f"p{i}": {"low": 0, "high": 2**50} for i in range(9)})
    assert grid_size(parameters, 10**6) == 10**6
    assert grid_size(parameters, 10**20) == 10**20


@st.composite
def spaces(draw_: st.DrawFn) -> dict[str, Values | Range]:
    """Up to six small parameters, each with conditions on earlier ones."""
    names = ["a", "b", "c", "d", "e", "f"][: draw_(st.integers(1, 6))]
    parameters: dict[str, Any] = {}
    for index, name in enumerate(names):
        parents = draw_(st.sets(st.sampled_from(names[:index]), max_size=2)) if index else set()
        when = {p: draw_(st.sets(st.integers(0, 4), min_size=1, max_size=2)) for p in parents}
        low = draw_(st.integers(0, 2))
        bounds = {"low": low, "high": low + draw_(st.integers(0, 2))}
        values = {"values": draw_(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))}
        parameters[name] = {
            **draw_(st.sampled_from([bounds, values])),
            "when": {parent: list(options) for parent, options in when.items()},
        }
    shuffled = draw_(st.permutations(names))
    return space(**{name: parameters[name] for name in shuffled})


def naive_grid(parameters: Mapping[str, Values | Range]) -> list[dict[str, Any]]:
    """All points by definition: every assignment, absent included, that the conditions allow."""
    absent = object()
    names = list(parameters)
    options = [
        [absent, *(p.values if isinstance(p, Values) else p.points or ())]
        for p in parameters.values()
    ]
    points = []
    for assignment in itertools.product(*options):
        point = {name: v for name, v in zip(names, assignment, strict=True) if v is not absent}
        if all(parameters[name].holds(point) is (name in point) for name in names):
            points.append(point)
    return points


@given(spaces())
def test_grid_and_its_size_agree_with_the_definition(
    parameters: dict[str, Values | Range],
) -> None:
    expected = naive_grid(parameters)
    found = list(grid(parameters))
    assert sorted(map(repr, map(sorted, map(dict.items, found)))) == sorted(
        map(repr, map(sorted, map(dict.items, expected)))
    )
    assert grid_size(parameters) == len(expected)
    assert grid_size(parameters, 3) == min(3, len(expected))


@given(spaces(), st.integers(0, 2**32))
def test_a_drawn_point_is_a_point_of_the_grid_and_depends_on_the_seed_alone(
    parameters: dict[str, Values | Range], seed: int
) -> None:
    point = draw(parameters, random.Random(seed))
    assert point in naive_grid(parameters)
    assert draw(parameters, random.Random(seed)) == point


@given(spaces())
def test_requirements_say_exactly_which_parameters_can_hold(
    parameters: dict[str, Values | Range],
) -> None:
    points = naive_grid(parameters)
    for path in parameters:
        needed = requirements(parameters, path)
        assert (needed is not None) is any(path in point for point in points)
        if needed is not None:
            assert path in draw(parameters, random.Random(0), needed)


def test_draws_keep_to_bounds_steps_and_logarithm() -> None:
    parameters = space(
        real={"low": 1e-4, "high": 1.0, "log": True},
        whole={"low": 1, "high": 1000, "log": True},
        stepped={"low": 16, "high": 64, "step": 16},
    )
    rng = random.Random(1)
    points = [draw(parameters, rng) for _ in range(600)]
    assert all(contains(parameters[path], value) for p in points for path, value in p.items())
    assert {point["stepped"] for point in points} == {16, 32, 48, 64}
    assert all(type(point["whole"]) is int for point in points)
    # Each decade gets its even share of the draws.
    assert 0.2 < sum(point["real"] < 1e-3 for point in points) / 600 < 0.3
    assert 0.25 < sum(point["whole"] < 10 for point in points) / 600 < 0.45


def test_drawing_among_some_values_only() -> None:
    rng = random.Random(0)
    points = [draw(conditional(), rng, {"a": ["y"], "b": [1]}) for _ in range(20)]
    assert all(point["a"] == "y" and point["b"] == 1 and "c" in point for point in points)


def test_what_changes_shapes_data_or_steps_is_structural() -> None:
    fused = {path for path in parameter_paths() if not structural(path)}
    assert {"optimizer.lr", "optimizer.weight_decay", "train.seed", "model.dropout"} <= fused
    assert not fused & {
        "model.name",
        "model.patch",
        "model.embed_dim",
        "data.name",
        "data.split_seed",
        "train.batch_size",
        "train.loss",
        "train.precision",
    }
    assert structural("model.argument_of_a_factory")

"""Whatever a file holds: a spec or a list of mistakes, soon, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sweeper.study.spec
from sweeper.config import TrialConfig
from sweeper.errors import StudyFileError
from sweeper.grid import grid
from sweeper.measurement import OBJECTIVE_METRICS
from sweeper.study.parse import loads
from sweeper.study.plan import plan
from sweeper.study.spec import StudySpec
from sweeper.study.variants import parameter_paths

TEMPLATE = Path(sweeper.study.spec.__file__).with_name("template.yaml").read_text()
STUDIES = [path.read_text() for path in Path(__file__).parents[2].glob("studies/*.yaml")]
SECONDS = 3.0  # far above the milliseconds it takes: the machine may be busy
calm = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def examined(text: str) -> StudySpec | None:
    """The spec of ``text``, or None; whatever else comes out fails the test."""
    started = time.process_time()
    try:
        spec = loads(text)
    except StudyFileError as error:
        spec = None
        assert error.mistakes
        places = [(mistake.line, mistake.column) for mistake in error.mistakes]
        lines = text.count("\n") + text.count("\r") + 1
        assert all(1 <= line <= lines + 1 and column >= 1 for line, column in places)
        assert places == sorted(places)
        assert all(mistake.message for mistake in error.mistakes)
    assert time.process_time() - started < SECONDS
    if spec is not None:
        assert StudySpec.model_validate_json(spec.stored()) == spec
        plan(spec)
    return spec


@calm
@given(st.text() | st.binary().map(lambda content: content.decode("latin-1")))
def test_arbitrary_text(text: str) -> None:
    examined(text)


@calm
@given(
    st.sampled_from([TEMPLATE, *STUDIES]),
    st.integers(0, 10**6),
    st.integers(0, 30),
    st.text(alphabet="ab0.-:,[]{}'\"&*# \n\t", max_size=8) | st.sampled_from(["null", "1e400"]),
)
def test_valid_files_with_a_piece_exchanged(text: str, at: int, length: int, piece: str) -> None:
    at %= len(text)
    examined(text[:at] + piece + text[at + length :])


@calm
@given(
    st.sampled_from([TEMPLATE, *STUDIES]), st.lists(st.integers(0, 10**6), max_size=6), st.data()
)
def test_valid_files_with_lines_moved_doubled_and_lost(
    text: str, cuts: list[int], data: st.DataObject
) -> None:
    lines = text.splitlines()
    for cut in cuts:
        line = lines.pop(cut % len(lines)) if len(lines) > 1 else ""
        for _ in range(data.draw(st.integers(0, 2))):
            lines.insert(data.draw(st.integers(0, len(lines))), line)
    examined("\n".join(lines))


KEYS = st.sampled_from(
    [
        *("name", "data", "model", "optimizer", "train", "search", "parameters", "objective"),
        *("reference", "resources", "faults", "sampler", "pruner", "values", "low", "high"),
        *("log", "when", "params", "reported", "source", "schedule", "augment", "patch", "root"),
        *("metric", "model.patch", "optimizer.lr", "optimizer.schedule", "model.name", "heads"),
        *("trials", "step", "lr", "x"),
    ]
)
SCALARS: st.SearchStrategy[Any] = (
    st.sampled_from(
        [
            *("mixer", "vit", "mlp", "cnn", "svm", "a:b", "cifar10", "circles", "image_folder"),
            *("grid", "reference", "median", "cosine", "exponential", "adam", "val_loss", ""),
            *("tpe", "~x"),
        ]
    )
    | st.integers(-3, 70)
    | st.sampled_from([2**62, -(2**63), 0.5, 1e-3, 1e308, -1e308, True, False, None])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@calm
@given(st.dictionaries(KEYS, TREES, max_size=8))
def test_mappings_of_known_words_in_wrong_places(tree: dict[str, Any]) -> None:
    examined(yaml.safe_dump(tree))


PARAMETER = (
    st.lists(SCALARS, min_size=1, max_size=4)
    | st.fixed_dictionaries({"low": st.integers(0, 9), "high": st.integers(0, 70)})
    | st.fixed_dictionaries({"low": st.floats(0, 1), "high": st.floats(0, 1)})
    | st.fixed_dictionaries(
        {
            "values": st.lists(SCALARS, min_size=1, max_size=3),
            "when": st.dictionaries(st.sampled_from(parameter_paths()), SCALARS, max_size=2),
        }
    )
)
SMALL = {
    "name": st.just("s"),
    "data": st.sampled_from([{"name": "digits"}, {"name": "circles"}, {"name": "cifar10"}]),
    "model": st.sampled_from([{"name": n} for n in ("mlp", "mixer", "vit", "cnn", "svm", "a:b")]),
    "objective": st.sampled_from(list(OBJECTIVE_METRICS)),
    "search": st.fixed_dictionaries(
        {"sampler": st.sampled_from(["tpe", "grid", "cmaes", "qmc"])},
        optional={"trials": st.integers(1, 3), "pruner": st.sampled_from(["median", "asha"])},
    ),
    "parameters": st.dictionaries(st.sampled_from(parameter_paths()), PARAMETER, max_size=3),
}


@settings(calm, max_examples=400)
@given(st.fixed_dictionaries(SMALL))
def test_every_grid_point_of_a_space_that_is_let_through_is_a_trial(tree: dict[str, Any]) -> None:
    spec = examined(yaml.safe_dump(tree))
    if spec is not None and plan(spec).points is not None:
        for _, point in zip(range(200), grid(spec.parameters), strict=False):
            assert isinstance(spec.trial_config(point), TrialConfig)


@pytest.mark.parametrize(
    "parameters",
    [
        "".join(f"  model.p{i}: [0, 1, 2]\n" for i in range(200)),
        "".join(
            f"  model.p{i}: {{values: [0, 1], when: {{model.p{(i + 1) % 200}: 1}}}}\n"
            for i in range(200)
        ),
        "".join(
            f"  model.p{i}: {{values: [0, 1, 2], when: {{"
            + ", ".join(f"model.p{j}: [0, 1]" for j in range(max(0, i - 12), i))
            + "}}\n"
            for i in range(60)
        ),
        "  model.a: [" + ", ".join(map(str, range(1000))) + "]\n"
        "  model.b: {values: [1], when: {model.a: [" + ", ".join(map(str, range(1000))) + "]}}\n",
        "  train.seed: {low: 0, high: 2147483647}\n  model.a: {low: 0.0, high: 1, step: 0.00002}\n",
        "  optimizer.lr: [" + ", ".join(f"-{i}" for i in range(1, 1000)) + "]\n",
        "  model.a: " + "[" * 15 + ", ".join(map(str, range(9000))) + "]" * 15 + "\n",
    ],
)
@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_spaces_made_to_be_slow(parameters: str, sampler: str) -> None:
    examined(
        "name: s\ndata: {name: digits}\nmodel: {name: 'a:b'}\n"
        f"search: {{sampler: {sampler}}}\nparameters:\n{parameters}"
    )


def test_a_long_list_of_published_results() -> None:
    trial = "    - {params: {optimizer.lr: 0.1, model.blocks: 3}, reported: {test_accuracy: 0.5}}\n"
    examined(
        "name: s\ndata: {name: digits}\nmodel: {name: mixer}\nsearch: {sampler: reference}\n"
        f"reference:\n  source: r\n  trials:\n{trial * 2500}"
    )

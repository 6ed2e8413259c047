"""The study files of the five reports: complete, as published, and every one of them trains."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sweeper.config import TrialConfig, shape_of
from sweeper.config.model import Timm
from sweeper.data import load as load_data
from sweeper.measurement import EPOCH_METRICS, FINAL_METRICS
from sweeper.models import build, parameter_count
from sweeper.space import Range, Values, draw
from sweeper.store.tickets import tickets
from sweeper.study.parse import load
from sweeper.study.plan import plan
from sweeper.study.spec import Grid, ReferenceOnly, StudySpec
from sweeper.training import prepare

FOLDER = Path(__file__).parents[1] / "studies"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

INDEX_ROW = re.compile(r"^\| (?P<report>.+?) \| .+ \| `(?P<file>\w+)\.yaml` \| (\d+) \| (\d+) \|$")
OUTSIDE_THE_GRID = {"mixer_kmnist": 1}
"""Published rows that are no point of their study's grid: R2's plateau schedule."""
REPORTS = {"R0", "R1a", "R1b", "R1c", "R1d", "R2", "R3", "R4.2", "R4.3", "R4.4", "R4.5", "R4.6"}
TRAINED_ROWS = {"cnn_cifar_standardize": 1}
"""The published row that is trained below, where it is not the last: ZCA takes half a minute."""


class Indexed(NamedTuple):
    """A line of the index in ``studies/README.md``."""

    report: str
    trials: int
    rows: int


def study(name: str, *overrides: str) -> StudySpec:
    return load(FOLDER / f"{name}.yaml", overrides)


def index() -> dict[str, Indexed]:
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := INDEX_ROW.match(line))]
    assert len({match["file"] for match in found}) == len(found), "a study is listed twice"
    return {
        match["file"]: Indexed(match["report"], int(match[3]), int(match[4])) for match in found
    }


def published(spec: StudySpec) -> list[TrialConfig]:
    trials = spec.reference.trials if spec.reference else ()
    return [spec.trial_config(trial.params) for trial in trials]


def test_the_index_lists_every_study_and_every_report() -> None:
    assert sorted(index()) == NAMES
    assert {row.report for row in index().values()} - {"–"} == REPORTS


@pytest.mark.parametrize("name", NAMES)
def test_a_study_plans_as_the_index_says(name: str) -> None:
    spec, row = study(name), index()[name]
    planned = plan(spec)
    assert spec.name == name
    assert (planned.trials, planned.reference_trials) == (row.trials, row.rows)
    assert spec.reference is None or spec.reference.source == row.report
    # A note would be a reported figure that is compared with nothing, or a budget beyond the space.
    assert planned.notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_published_rows_of_a_grid_are_points_of_it(name: str) -> None:
    spec = study(name)
    planned = plan(spec)
    with_reference = len(tickets(spec, with_reference=True))
    match spec.search.sampler:
        case Grid():
            assert with_reference == planned.trials + OUTSIDE_THE_GRID.get(name, 0)
        case ReferenceOnly():
            assert with_reference == planned.trials
        case _:
            assert with_reference == planned.trials + planned.reference_trials


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_published_once(name: str) -> None:
    rows = [config.model_dump_json() for config in published(study(name))]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_of_every_published_row_can_be_built(name: str) -> None:
    configs = {config.model.model_dump_json(): config for config in published(study(name))}
    for config in configs.values():
        shape = shape_of(config.data)
        assert shape is not None
        assert (parameter_count(config.model, shape) > 0) is (config.model.name != "svm")


def test_the_mixers_of_r4_4_have_the_parameters_of_the_formula() -> None:
    spec = study("mixer_cifar_patch")
    assert spec.reference is not None
    assert [trial.params for trial in spec.reference.trials] == [
        {"model.patch": patch} for patch in (4, 8, 16)
    ]
    for trial, config in zip(spec.reference.trials, published(spec), strict=True):
        p = trial.params["model.patch"]
        formula = 768 * p * p + 4 * (263_168 // (p * p) + 526_720) + 3338
        assert trial.reported["model_parameters"] == formula
        shape = shape_of(config.data)
        assert shape is not None
        assert parameter_count(config.model, shape) == formula


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cnn_cifar_")])
def test_the_cnns_of_r1b_have_1_190_000_weights_without_biases(name: str) -> None:
    for config in published(study(name)):
        shape = shape_of(config.data)
        assert shape is not None
        with torch.device("meta"):
            model = build(config.model, shape)
        assert sum(weight.numel() for weight in model.parameters() if weight.ndim > 1) == 1_190_000


def test_the_steps_of_r1b_each_add_one_thing_to_the_one_before() -> None:
    spec = study("cnn_cifar_steps")
    assert spec.reference is not None
    rows = [trial.params for trial in spec.reference.trials]
    added = []
    for before, after in itertools.pairwise(rows[1:]):
        assert before.items() <= after.items()
        added.append(sorted(after.keys() - before.keys()))
    assert (rows[0], rows[1]) == ({"data.standardize": "none"}, {"data.standardize": "channel"})
    assert added == [
        ["data.augment", "model.ceil_mode"],
        ["optimizer.schedule"],
        ["model.dropout"],
        ["model.batch_norm"],
    ]
    assert all(shape_of(config.data) == (3, 28, 28, 10) for config in published(spec)[2:])


def test_the_sweeps_of_r4_search_the_published_spaces() -> None:
    """And the published rows hold the values outside them that the report's tables have."""
    rates = {0.01, 0.025, 0.05, 0.075, 0.001, 0.0025, 0.0075, 0.0001, 0.00025, 0.00075}
    decays = {0.01, 0.075, 0.001, 0.005, 0.0075, 1e-4, 2.5e-4, 7.5e-4, 1e-5, 2.5e-5, 7.5e-5}
    resnet, mixer = study("resnet18_cifar").parameters, study("mixer_cifar").parameters
    for parameters, more_rates, more_decays in ((resnet, set(), set()), (mixer, {0.005}, {5e-4})):
        listed = {
            path: set(each.values) for path, each in parameters.items() if isinstance(each, Values)
        }
        assert listed["train.batch_size"] == {64, 128, 256, 512, 1024}
        assert listed["optimizer.name"] == {"sgd", "momentum", "adam", "adamw"}
        assert listed["optimizer.lr"] == rates | more_rates
        assert listed["optimizer.momentum"] == {round(0.1 * tenth, 1) for tenth in range(1, 10)}
        assert listed["optimizer.weight_decay"] == decays | more_decays
    assert mixer["model.embed_dim"] == Range(low=64, high=300)
    rows = study("mixer_cifar").reference
    assert rows is not None
    assert {row.params["train.batch_size"] for row in rows.trials} == {32, 64, 128}
    assert {0.85, 0.95} < {row.params["optimizer.momentum"] for row in rows.trials}


# --- training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As a worker on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_data(
    idx_folder: Callable[..., Path], image_folder: Callable[..., Path]
) -> Callable[[str], tuple[Path, list[str]]]:
    """A data folder with a small data set, and the overrides that use it."""

    def make(name: str) -> tuple[Path, list[str]]:
        if name in {"mnist", "fashion_mnist", "kmnist"}:
            return idx_folder(name, train=40, test=20), ["data.validation=10"]
        if name == "cifar10":
            classes = [f"class {number}" for number in range(10)]
            root = image_folder(classes, train=4, test=1, size=(32, 32))
            where = f"data.root={json.dumps(str(root))}"
            return root, ["data.name=image_folder", where, "data.validation=10"]
        return Path("nowhere"), ["data.limit=40", "data.validation=10"]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_trains_on_small_data(
    name: str, small_data: Callable[[str], tuple[Path, list[str]]]
) -> None:
    folder, overrides = small_data(study(name).data.name)
    spec = study(name, *overrides)
    values: dict[str, Any] = {"train.epochs": 1, "train.batch_size": 16}
    if spec.reference is None:
        values = {**draw(spec.parameters, random.Random(0)), **values}
    else:
        row = spec.reference.trials[TRAINED_ROWS.get(name, -1)]
        values = {**row.params, **values}
    if isinstance(spec.model, Timm):
        values |= {"model.pretrained": False, "model.image_size": 32}
    config = spec.trial_config(values)
    dataset = load_data(config.data, folder=folder, device=torch.device("cpu"))
    training = prepare(config, folder=folder, device=torch.device("cpu"), dataset=dataset)
    epochs = list(training.epochs())
    assert [epoch.epoch for epoch in epochs] == [1]
    assert epochs[0].metrics.keys() >= EPOCH_METRICS.keys()
    assert epochs[0].finite
    tested = training.test()
    assert tested.keys() == FINAL_METRICS.keys()
    assert all(math.isfinite(value) for value in tested.values())
    assert shape_of(config.data) == dataset.shape
    assert training.parameters == parameter_count(config.model, dataset.shape)
    training.close()

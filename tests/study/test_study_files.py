"""The study files that come with the project, and the template of ``sweeper init``."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

import sweeper.study.spec
from sweeper.config import TrialConfig
from sweeper.space import Range, Values, contains, draw
from sweeper.study.parse import load, loads
from sweeper.study.plan import plan
from sweeper.study.spec import StudySpec

FOLDER = Path(__file__).parents[2] / "studies"
TEMPLATE = Path(sweeper.study.spec.__file__).with_name("template.yaml")


@pytest.mark.parametrize("file", [TEMPLATE, *sorted(FOLDER.glob("*.yaml"))], ids=lambda f: f.name)
def test_every_study_file_is_valid_and_survives_the_store(file: Path) -> None:
    spec = load(file)
    assert StudySpec.model_validate_json(spec.stored()) == spec
    assert plan(spec).trials > 0
    rng = random.Random(0)
    for _ in range(20):
        assert isinstance(spec.trial_config(draw(spec.parameters, rng)), TrialConfig)
    for trial in spec.reference.trials if spec.reference else ():
        assert isinstance(spec.trial_config(trial.params), TrialConfig)


def test_study_names_differ_and_are_those_of_the_files() -> None:
    names = {file.stem: load(file).name for file in FOLDER.glob("*.yaml")}
    assert {"mixer_digits", "mixer_cifar"} <= names.keys()
    assert all(stem == name for stem, name in names.items())


def test_what_the_template_has_in_comments_is_valid_too() -> None:
    head, tail = TEMPLATE.read_text().split("# reference:\n")
    spec = loads(f"{head}reference:\n" + re.sub(r"^# ", "", tail, flags=re.MULTILINE))
    assert spec.reference is not None
    assert spec.reference.trials[0].reported == {"test_accuracy": 0.97}


def test_the_mixer_sweep_has_the_space_and_the_rows_of_the_report() -> None:
    spec = load(FOLDER / "mixer_cifar.yaml")
    p = spec.parameters
    assert p["train.batch_size"] == Values(values=(64, 128, 256, 512, 1024))
    assert p["optimizer.name"] == Values(values=("sgd", "momentum", "adam", "adamw"))
    assert isinstance(p["optimizer.lr"], Values)
    assert sorted(p["optimizer.lr"].values) == [
        *(0.0001, 0.00025, 0.00075, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075)
    ]
    assert p["optimizer.momentum"] == Values(
        values=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        when={"optimizer.name": ("momentum", "adam", "adamw")},
    )
    assert isinstance(p["optimizer.weight_decay"], Values)
    assert sorted(p["optimizer.weight_decay"].values) == [
        *(0.00001, 0.000025, 0.000075, 0.0001, 0.00025, 0.0005, 0.00075),
        *(0.001, 0.005, 0.0075, 0.01, 0.075),
    ]
    assert p["model.embed_dim"] == Range(low=64, high=300)
    assert p["model.blocks"] == Values(values=(2, 3, 4, 5, 6))
    assert p["model.dropout"] == Values(values=(0.1, 0.2, 0.3, 0.4))
    assert (spec.search.trials, spec.train.epochs) == (30, 30)
    assert spec.data.model_dump()["validation"] == 5000
    assert spec.reference is not None
    rows = spec.reference.trials
    assert [row.reported["test_accuracy"] for row in rows] == [
        *(0.7289, 0.7590, 0.7637, 0.7339, 0.7445, 0.7605, 0.7220, 0.7562)
    ]
    assert [row.reported["max_val_accuracy"] for row in rows] == [
        *(0.7941, 0.9537, 0.9124, 0.7840, 0.8892, 0.9501, 0.8130, 0.9343)
    ]
    assert all(row.params.keys() == p.keys() for row in rows)
    outside = {
        (path, value)
        for row in rows
        for path, value in row.params.items()
        if not contains(p[path], value)
    }
    assert outside == {
        ("train.batch_size", 32),
        ("optimizer.momentum", 0.85),
        ("optimizer.momentum", 0.95),
        ("model.dropout", 0.0),
    }

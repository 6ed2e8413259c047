"""How often a worker expects a study to run the same compiled program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeper.settings import Settings
from sweeper.study.spec import StudySpec
from sweeper.worker.compiling import going_by, repeats

LR = {"low": 1.0e-4, "high": 0.1, "log": True}


def study(parameters: dict[str, Any], **search: Any) -> StudySpec:
    return StudySpec.model_validate(
        {
            "name": "study",
            "data": {"name": "digits"},
            "model": {"name": "mlp"},
            "search": {"trials": 12, "sampler": "random", **search},
            "parameters": parameters,
        }
    )


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"optimizer.lr": LR, "train.seed": [0, 1], "model.init": ["default", "orthogonal"]}, 12),
        ({"optimizer.lr": LR, "train.batch_size": [32, 64, 128]}, 4),
        ({"optimizer.lr": LR, "model.width": {"low": 16, "high": 64}}, 1),
        ({"optimizer.lr": LR, "model.dropout": {"low": 0.0, "high": 0.5}}, 1),
        ({"optimizer.lr": LR, "train.label_smoothing": [0.0, 0.1]}, 6),
    ],
)
def test_the_budget_is_spread_over_what_changes_the_program(
    parameters: dict[str, Any], expected: int
) -> None:
    assert repeats(study(parameters)) == expected


def test_a_grid_repeats_what_its_other_parameters_repeat() -> None:
    spec = study({"train.seed": [0, 1, 2], "model.layers": [1, 2]}, sampler="grid", trials=None)
    assert repeats(spec) == 3


def test_workers_of_a_home_folder_share_what_they_measured_and_compiled(tmp_path: Path) -> None:
    how = going_by(Settings.resolve(home=tmp_path, environment={}), study({"train.seed": [0, 1]}))
    assert how.measured == tmp_path / "compiled.json"
    assert how.code == tmp_path / "compiled"
    assert how.repeats == how.together == 12


def test_rates_change_the_program_of_a_trial_and_not_that_of_a_cohort(
    tmp_path: Path,
) -> None:
    for path in ("model.dropout", "train.label_smoothing"):
        parameters = {path: [0.1, 0.2, 0.3], "train.seed": [0, 1]}
        how = going_by(Settings.resolve(home=tmp_path, environment={}), study(parameters))
        assert (how.repeats, how.together) == (4, 12)

"""What is taken for a difference between store and MLflow, and what settling a run logs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from report.conftest import made, row

from sweeper.service import agreement
from sweeper.settings import Settings, run_key
from sweeper.store import Standing
from sweeper.tracking.audit import AuditedRun
from sweeper.tracking.protocol import text
from sweeper.worker import flattened

CROP = {"name": "crop", "size": 6, "padding": 0}


def run_of(now: Standing, number: int) -> AuditedRun:
    """The run of a completed trial of one epoch, as its worker would have told of it."""
    config = now.spec.trial_config(now.rows[number].params).model_dump(mode="json")
    return AuditedRun(
        run_id=f"run{number}",
        key=run_key(now.spec.name, number),
        status="FINISHED",
        tags={"sweeper.state": "complete", "sweeper.outcome": "completed"},
        params={path: text(value) for path, value in flattened(config).items()},
        metrics={},
        points={"train_loss": {1: 1}},
    )


@pytest.fixture
def settings(tmp_path: Any) -> Settings:
    return Settings.resolve(home=tmp_path, environment={})


def test_a_parameter_is_compared_with_what_it_leaves_to_defaults(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of an augmentation is told to MLflow with all of its fields."""
    choices: list[Any] = [[], [CROP, "color_jitter"], [{"name": "rotation", "degrees": 15}]]
    now = made(
        *(row(number, params={"data.augment": each}) for number, each in enumerate(choices)),
        parameters={"data.augment": choices},
    ).now
    runs = [run_of(now, number) for number in range(len(choices))]
    monkeypatch.setattr(agreement, "audited", lambda *_, owner: runs)
    assert agreement.differences(now, settings) == []
    runs[1] = replace(runs[1], params={**runs[1].params, "data.augment": text([CROP])})
    (found,) = agreement.differences(now, settings)
    assert found.startswith("trial 1: data.augment is [")
    assert found.endswith(f"but {text([CROP])} in MLflow")


@pytest.mark.parametrize(
    ("objective", "history", "asked"),
    [
        ("val_accuracy", {1: 0.4, 2: 0.5}, []),
        (["val_accuracy", "val_loss"], {}, ["train_loss"]),
    ],
)
def test_final_metrics_are_settled_at_the_last_epoch(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    objective: Any,
    history: dict[int, float],
    asked: list[str],
) -> None:
    """The store has no epochs of a trial with several objectives: MLflow has them."""
    now = made(row(0, accuracy=0.9, history=history), objective=objective).now
    points = {name: {1: 1, 2: 1} for name in asked}
    run = replace(run_of(now, 0), status="RUNNING", points=points)
    wanted: list[list[str]] = []
    told: list[tuple[Any, ...]] = []

    def audited(_settings: Settings, _study: str, metrics: list[str], owner: Any) -> Any:
        wanted.append(metrics)
        return [run]

    monkeypatch.setattr(agreement, "audited", audited)
    monkeypatch.setattr(agreement, "end_run", lambda *args: told.append(args[2:]))
    assert agreement.settle(now, settings) == 1
    tags = {"sweeper.state": "complete", "sweeper.outcome": "completed"}
    assert told == [("FINISHED", tags, {"test_accuracy": 0.9}, 2)]
    assert wanted == [asked]

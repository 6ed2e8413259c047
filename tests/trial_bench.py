"""Trials alone and in cohorts on one small data set, and what "as alone" means to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper.config import DataShape, TrialConfig
from sweeper.data import Dataset
from sweeper.measurement import Measurement
from sweeper.training import Compiling, prepare
from sweeper.training.base import Training, Trial
from sweeper.training.cohort import Cohort

CPU = torch.device("cpu")
COLOUR = DataShape(3, 8, 8, 4)
MakeConfig = Callable[..., TrialConfig]
MakeDataset = Callable[..., Dataset]

MLP: dict[str, Any] = {"name": "mlp", "width": 12, "layers": 1, "norm": "batch"}
MODELS: dict[str, dict[str, Any]] = {
    "mixer": {"name": "mixer", "patch": 4, "embed_dim": 8, "blocks": 2, "stem_norm": "batch"},
    "mlp": MLP,
    "vit": {"name": "vit", "patch": 4, "embed_dim": 8, "blocks": 1, "position": "learned"},
    "cnn": {"name": "cnn", "channels": [4, 4], "hidden": 16, "batch_norm": True},
}
OPTIMIZERS = ["sgd", "momentum", "nesterov", "adam", "adamw"]
COMPARED = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr")


def varied(index: int, optimizer: str, **further: Any) -> dict[str, Any]:
    """A section ``optimizer`` that shares no number with that of another index."""
    return {
        "name": optimizer,
        "lr": (0.03, 0.01, 0.02, 0.004, 0.008)[index % 5],
        "weight_decay": (0.0, 1e-3, 1e-2, 1e-4, 0.1)[index % 5],
        "momentum": (0.9, 0.5, 0.8, 0.7, 0.95)[index % 5],
        "clip_norm": (None, 1.0, None, 0.2, None)[index % 5],
        **further,
    }


class Bench:
    """Builds configurations, and trains them alone or in a cohort on one data set."""

    def __init__(self, make_config: MakeConfig, make_dataset: MakeDataset) -> None:
        self._make_config, self._make_dataset = make_config, make_dataset
        self._dataset: Dataset | None = None

    def config(
        self,
        index: int,
        optimizer: dict[str, Any],
        model: dict[str, Any] = MLP,
        data: dict[str, Any] | None = None,
        **train: Any,
    ) -> TrialConfig:
        dropout = (0.0, 0.1, 0.3, 0.5, 0.2)[index % 5]
        smoothing = (0.0, 0.1, 0.0, 0.2, 0.05)[index % 5]
        options = {
            "batch_size": 20,
            "epochs": 3,
            "precision": "float64",
            "seed": 7 * index,
            "label_smoothing": smoothing,
        }
        return self._make_config(
            {**model, "dropout": dropout}, optimizer, data, **{**options, **train}
        )

    def dataset(self, config: TrialConfig) -> Dataset:
        if self._dataset is None:
            self._dataset = self._make_dataset(config, train=205, shape=COLOUR)
        return self._dataset

    def cohort(self, config: TrialConfig, compiling: Compiling | None = None) -> Cohort:
        return Cohort(config, dataset=self.dataset(config), device=CPU, compiling=compiling)

    def alone(self, config: TrialConfig) -> Training:
        return prepare(config, folder=Path(), device=CPU, dataset=self.dataset(config))


def assert_equal(
    member: Trial, history: Sequence[Measurement], alone: Trial, expected: Sequence[Measurement]
) -> None:
    """Weights, running statistics, optimizer state, every measurement and the test set."""
    assert [each.epoch for each in history] == [each.epoch for each in expected]
    for mine, theirs in zip(history, expected, strict=True):
        for metric in COMPARED:
            assert mine.metrics[metric] == pytest.approx(theirs.metrics[metric], rel=1e-7), metric
    found, wanted = member.state_dict(), alone.state_dict()
    torch.testing.assert_close(found["engine"], wanted["engine"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(member.best_weights(), alone.best_weights(), rtol=1e-6, atol=1e-8)
    assert found["best"]["epoch"] == wanted["best"]["epoch"]
    assert found["schedule"] == pytest.approx(wanted["schedule"])
    assert member.test() == pytest.approx(alone.test(), rel=1e-7)


def assert_as_alone(bench: Bench, member: Trial, history: Sequence[Measurement]) -> None:
    alone = bench.alone(member.config)
    assert_equal(member, history, alone, list(alone.epochs()))

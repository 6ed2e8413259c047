"""Trials on the GPU, eager and alone, as those that are captured and have company must be.

In float64, with learning rates that are powers of two, as in the tests of a trial's own graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper.config import DataShape, TrialConfig
from sweeper.data import Dataset
from sweeper.training import best_device, prepare
from sweeper.training.base import Trial
from sweeper.training.cohort import Cohort

MakeConfig = Callable[..., TrialConfig]
MakeDataset = Callable[..., Dataset]

COLOUR = DataShape(3, 16, 16, 4)
AUGMENT = ["crop", "flip", "color_jitter", "rotation"]
MODELS: dict[str, dict[str, Any]] = {
    "mixer": {"name": "mixer", "patch": 4, "embed_dim": 16, "blocks": 2, "norm": "batch"},
    "mlp": {"name": "mlp", "width": 32, "norm": "batch"},
    "cnn": {"name": "cnn", "channels": [8, 8], "hidden": 32, "batch_norm": True},
    "vit": {"name": "vit", "patch": 4, "embed_dim": 16, "blocks": 2},
}
OPTIMIZERS = ["sgd", "momentum", "nesterov", "adam", "adamw"]


class Bench:
    """Cohorts and trials alone, on the GPU."""

    def __init__(self, make_config: MakeConfig, make_dataset: MakeDataset) -> None:
        self._make_config, self._make_dataset = make_config, make_dataset
        self._dataset: Dataset | None = None

    def config(self, index: int, model: dict[str, Any], *, dropout: float, **train: Any) -> Any:
        optimizer = {
            "name": OPTIMIZERS[index % 5],
            "lr": 2.0 ** -(6 + index % 3),
            "weight_decay": 2.0**-10 * index,
            "clip_norm": None if index % 2 else 1.0,
        }
        options = {"batch_size": 16, "epochs": 2, "precision": "float64", "seed": index, **train}
        section = {**model, "dropout": dropout}
        return self._make_config(section, optimizer, {"augment": AUGMENT}, **options)

    def dataset(self, config: TrialConfig) -> Dataset:
        if self._dataset is None:
            self._dataset = self._make_dataset(
                config, train=16 * 15 + 5, shape=COLOUR, device=best_device()
            )
        return self._dataset

    def cohort(self, config: TrialConfig) -> Cohort:
        return Cohort(config, dataset=self.dataset(config), device=best_device())

    def assert_as_alone(self, member: Trial) -> None:
        config = member.config
        plain = config.train.model_copy(update={"graph": "off", "compile": "off"})
        eager = config.model_copy(update={"train": plain})
        dataset = self.dataset(config)
        alone = prepare(eager, folder=Path(), device=best_device(), dataset=dataset)
        list(alone.epochs())
        found, wanted = (each.state_dict()["engine"]["model"] for each in (member, alone))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        assert member.test() == pytest.approx(alone.test(), rel=1e-5)

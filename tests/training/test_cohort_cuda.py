"""Cohorts on a real GPU: the captured step of all members against eager ones and against trials
alone, in float64. Learning rates are powers of two, as in the tests of a trial's own graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper.config import DataShape, TrialConfig
from sweeper.data import Dataset
from sweeper.training import best_device, prepare
from sweeper.training.capture import _waiting_forbidden
from sweeper.training.cohort import Cohort, Member
from sweeper.training.turns import driven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
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

    def assert_as_alone(self, member: Member) -> None:
        config = member.config
        eager = config.model_copy(
            update={"train": config.train.model_copy(update={"graph": "off"})}
        )
        dataset = self.dataset(config)
        alone = prepare(eager, folder=Path(), device=best_device(), dataset=dataset)
        list(alone.epochs())
        found, wanted = (each.state_dict()["engine"]["model"] for each in (member, alone))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        assert member.test() == pytest.approx(alone.test(), rel=1e-5)


@pytest.fixture
def bench(make_config: MakeConfig, make_dataset: MakeDataset) -> Bench:
    return Bench(make_config, make_dataset)


@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("model", MODELS)
def test_members_get_what_they_get_alone(model: str, graph: str, bench: Bench) -> None:
    configs = [
        bench.config(index, MODELS[model], dropout=0.1 * index, graph=graph) for index in range(5)
    ]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs]
    for _ in range(2):
        cohort.epoch()
    assert cohort.graph == ("captured" if graph == "on" else "not used: train.graph is off")
    cohort.test(members)
    for member in members:
        bench.assert_as_alone(member)


def test_a_refill_goes_on_in_the_same_graph_where_it_can(bench: Bench) -> None:
    model = MODELS["mlp"]
    cohort = bench.cohort(bench.config(0, model, dropout=0.25, graph="on"))
    leaving, staying = (
        cohort.join(bench.config(index, model, dropout=0.25, graph="on")) for index in (0, 3)
    )
    cohort.epoch()
    engine = cohort._open()
    before = engine._graph
    leaving.close()
    refill = cohort.join(bench.config(5, model, dropout=0.25, graph="on"))
    cohort.epoch()
    assert engine._graph is before
    bench.assert_as_alone(staying)
    staying.close()
    other = cohort.join(bench.config(8, model, dropout=0.5, graph="on"))
    cohort.epoch()
    assert engine._graph is not before
    bench.assert_as_alone(refill)
    refill.close()
    cohort.epoch()
    bench.assert_as_alone(other)


@pytest.mark.parametrize("model", MODELS)
def test_the_host_never_waits_within_an_epoch(model: str, bench: Bench) -> None:
    cohort = bench.cohort(bench.config(0, MODELS[model], dropout=0.1, precision="bfloat16"))
    for index in range(4):
        cohort.join(bench.config(index, MODELS[model], dropout=0.1, precision="bfloat16"))
    cohort.epoch()
    engine = cohort._open()
    engine._template.train()
    engine._rewind()
    with _waiting_forbidden():
        driven(engine._all_batches(), lambda: None)

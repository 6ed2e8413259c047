"""Cohorts on a real GPU: the captured step of all members against eager ones and against trials
alone, in float64. Learning rates are powers of two, as in the tests of a trial's own graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_bench import MODELS, Bench, MakeConfig, MakeDataset

from sweeper.training import best_device, prepare
from sweeper.training.capture import _waiting_forbidden
from sweeper.training.rows import numbers
from sweeper.training.turns import driven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


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
    assert cohort._open()._optimizer._fused is not None
    cohort.test(members)
    for member in members:
        bench.assert_as_alone(member)


@pytest.mark.parametrize("model", MODELS)
def test_members_of_a_compiled_cohort_get_what_they_get_alone(model: str, bench: Bench) -> None:
    configs = [
        bench.config(index, MODELS[model], dropout=0.1 * index, graph="on", compile="on")
        for index in range(5)
    ]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs]
    for _ in range(2):
        cohort.epoch()
    assert cohort.graph == "captured"
    assert cohort._open().is_compiled
    for member in members:
        bench.assert_as_alone(member)


def test_an_update_of_large_gradients_by_themselves_is_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: alone and together."""

    def states() -> list[dict[str, Any]]:
        options = {"dropout": 0.0, "precision": "bfloat16", "graph": "on"}
        configs = [bench.config(index, MODELS["mlp"], **options) for index in (1, 3)]  # no clipping
        cohort, data = bench.cohort(configs[0]), bench.dataset(configs[0])
        alone = prepare(configs[0], folder=Path(), device=best_device(), dataset=data)
        members = [cohort.join(config) for config in configs]
        cohort.epoch()
        epochs = alone.epochs()
        next(epochs)
        return [each.state_dict()["engine"] for each in (alone, *members)]

    usual = states()
    monkeypatch.setattr(numbers, "LARGE", 1)
    torch.testing.assert_close(states(), usual, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_members_learn_in_every_precision(model: str, precision: str, bench: Bench) -> None:
    options = {"dropout": 0.0, "precision": precision, "epochs": 20, "graph": "on"}
    configs = [bench.config(3, MODELS[model], **options, seed=seed) for seed in range(3)]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs]
    epochs = [dict(cohort.epoch()) for _ in range(20)]
    engine = cohort._open()
    size = engine.layout.lowered_size
    assert bool(size) == (precision == "bfloat16")
    lowered = engine._numbers.weights[:, :size].to(engine._leaves.lowered.dtype)
    assert torch.equal(engine._leaves.lowered, lowered)
    for member in members:
        first, last = (epochs[i][member].metrics["train_loss"] for i in (0, -1))
        assert last < 0.8 * first


def test_a_refill_goes_on_in_the_same_graph_where_it_can(bench: Bench) -> None:
    model = MODELS["mlp"]
    cohort = bench.cohort(bench.config(0, model, dropout=0.25, graph="on"))
    leaving, staying = (
        cohort.join(bench.config(index, model, dropout=0.25, graph="on")) for index in (0, 3)
    )
    cohort.epoch()
    engine = cohort._open()
    before = engine._ready.graph
    leaving.close()
    refill = cohort.join(bench.config(10, model, dropout=0.25, graph="on"))
    cohort.epoch()
    assert engine._ready.graph is before
    bench.assert_as_alone(staying)
    staying.close()
    other = cohort.join(bench.config(8, model, dropout=0.5, graph="on"))
    cohort.epoch()
    assert engine._ready.graph is not before
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

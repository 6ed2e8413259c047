"""Batches: their order, and how images become what the model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper.config import DataShape, TrialConfig
from sweeper.config.model import Mlp, Timm
from sweeper.data import Dataset
from sweeper.training import estimate_s, prepare
from sweeper.training.device import noise, noise_generator, stream
from sweeper.training.evaluation import evaluation_batch
from sweeper.training.inputs import Inputs, Order
from sweeper.training.precision import precision_of

CPU = torch.device("cpu")
MakeConfig = Callable[..., TrialConfig]
MakeDataset = Callable[..., Dataset]


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),  # a single image would break batch normalization
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
        (5, 2, [2, 3]),
    ],
)
def test_every_image_comes_once_an_epoch(count: int, batch: int, sizes: list[int]) -> None:
    order = Order(count, batch_size=batch, device=CPU)
    order.shuffle(1)
    parts = [*order.batches(), order.rest()] if order.tail else order.batches()
    assert [len(part) for part in parts] == sizes
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert order.full == sum(size == batch for size in sizes)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def drawn(seed: int, epoch: int, after: int) -> list[int]:
        order = Order(100, batch_size=100, device=CPU)
        for earlier in range(after):
            order.shuffle(earlier)
        order.shuffle(stream(seed, "order", epoch))
        return order.batches()[0].tolist()

    assert drawn(0, 3, after=0) == drawn(0, 3, after=2)
    assert drawn(0, 3, after=0) != drawn(0, 4, after=0)
    assert drawn(0, 3, after=0) != drawn(1, 3, after=0)


def test_batches_counted_on_the_device_are_the_same_batches() -> None:
    order = Order(50, batch_size=8, device=CPU)
    for seed in (1, 2):
        order.shuffle(seed)
        for expected in order.batches():
            assert torch.equal(order.following(), expected)


def test_streams_differ_by_purpose_epoch_and_seed() -> None:
    seeds = {
        stream(seed, purpose, epoch)
        for seed in range(10)
        for purpose in ("order", "noise")
        for epoch in range(10)
    }
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_is_seeded_and_put_back() -> None:
    before = torch.get_rng_state()
    with noise(CPU, 5):
        one = torch.rand(3, generator=noise_generator(CPU))
    with noise(CPU, 5):
        other = torch.rand(3)
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_standardizing_once_or_every_batch_gives_the_same_images(
    make_config: MakeConfig, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    dataset = make_dataset(config)
    precision = precision_of(config.train, CPU)
    once = Inputs(dataset.train, dataset=dataset, precision=precision, augmented=True)
    monkeypatch.setattr("sweeper.training.inputs.KEPT_BYTES", {"cpu": 100})
    each = Inputs(dataset.train, dataset=dataset, precision=precision, augmented=True)
    assert (once.kept_standardized, each.kept_standardized) == (True, False)
    index = torch.tensor([7, 0, 199])
    expected = dataset.standardize(dataset.train.images[index])
    for inputs in (once, each):
        x, labels = inputs.take(index)
        assert torch.equal(x, expected)
        assert torch.equal(labels, dataset.train.labels[index])
        assert torch.equal(inputs.span(5, 9)[0], dataset.standardize(dataset.train.images[5:9]))


def test_only_training_images_are_augmented(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(data={"augment": [{"name": "crop", "padding": 3}]})
    dataset = make_dataset(config)
    precision = precision_of(config.train, CPU)
    index = torch.arange(50)
    plain = dataset.standardize(dataset.val.images[index])
    for augmented in (False, True):
        inputs = Inputs(dataset.val, dataset=dataset, precision=precision, augmented=augmented)
        assert torch.equal(inputs.take(index)[0], plain) is not augmented


def test_the_evaluation_batch_depends_on_the_image_alone() -> None:
    mlp, timm = Mlp(name="mlp"), Timm(name="timm", architecture="resnet18", image_size=224)
    grey, colour = DataShape(1, 28, 28, 10), DataShape(3, 32, 32, 10)
    cuda = torch.device("cuda", 0)
    assert evaluation_batch(mlp, grey, CPU) == 334
    assert evaluation_batch(mlp, colour, cuda) == 4096
    assert evaluation_batch(timm, colour, cuda) == 111
    assert evaluation_batch(mlp, DataShape(3, 4096, 4096, 2), CPU) == 1


def test_the_size_of_evaluation_batches_does_not_change_the_result(
    make_config: MakeConfig, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(epochs=1, precision="float64")
    dataset = make_dataset(config)
    found = []
    for values in (64 * 7, 2**18):
        monkeypatch.setattr("sweeper.training.evaluation._VALUES_A_BATCH", {"cpu": values})
        training = prepare(config, folder=Path("nowhere"), device=CPU, dataset=dataset)
        (measurement,) = training.epochs()
        found.append((measurement.metrics["val_loss"], measurement.metrics["val_accuracy"]))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("augment", [["flip"], [{"name": "crop", "padding": 2, "size": 24}]])
@pytest.mark.parametrize("name", ["mnist", "circles"])
def test_data_need_not_be_there_to_be_estimated(
    name: str, augment: list[Any], make_config: MakeConfig
) -> None:
    data = {"name": name, "augment": augment if name == "mnist" else []}
    seconds = estimate_s(make_config({"name": "mlp", "width": 8}, data=data), device=CPU)
    assert seconds is not None
    assert seconds > 0


def test_an_estimate_is_near_the_time_a_trial_takes(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    """Within a factor of ten, which a machine busy with other things keeps as well."""
    config = make_config({"name": "mlp", "width": 512}, epochs=3, batch_size=64)
    estimated = estimate_s(config, device=CPU)
    dataset = replace(make_dataset(config, train=1293, val=144, shape=DataShape(1, 8, 8, 10)))
    training = prepare(config, folder=Path("nowhere"), device=CPU, dataset=dataset)
    taken = sum(m.metrics["seconds"] + m.metrics["val_seconds"] for m in training.epochs())
    assert estimated is not None
    assert taken / 10 < estimated < taken * 10


def test_what_cannot_be_estimated_is_none(make_config: MakeConfig, tmp_path: Path) -> None:
    assert estimate_s(make_config({"name": "svm"}), device=CPU) is None
    folder = make_config(data={"name": "image_folder", "root": str(tmp_path)})
    assert estimate_s(folder, device=CPU) is None

"""Training and evaluation against loops written out by hand, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper.config import TrialConfig
from sweeper.config.optimizer import OptimizerName
from sweeper.data import Dataset
from sweeper.models import build
from sweeper.training import prepare
from sweeper.training.device import stream
from sweeper.training.engine import Engine

CPU = torch.device("cpu")
MakeConfig = Callable[..., TrialConfig]
MakeDataset = Callable[..., Dataset]

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "width": 12, "layers": 1, "norm": "batch"},
    "mixer": {"name": "mixer", "patch": 4, "embed_dim": 8, "blocks": 1},
}


def batches_of(config: TrialConfig, count: int, epoch: int) -> Iterator[Tensor]:
    """The documented order: drawn on the CPU from the seed of the epoch; the rest comes last."""
    generator = torch.Generator().manual_seed(stream(config.train.seed, "order", epoch))
    order = torch.randperm(count, generator=generator)
    yield from torch.split(order, config.train.batch_size)


def loss_of(config: TrialConfig, logits: Tensor, labels: Tensor) -> Tensor:
    if config.train.loss == "cross_entropy":
        smoothing = config.train.label_smoothing
        return functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    target = functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return functional.mse_loss(logits, target)


def trained_by_hand(
    config: TrialConfig, dataset: Dataset, make: Callable[..., torch.optim.Optimizer]
) -> tuple[nn.Module, list[float], list[float]]:
    """The model, and mean loss and accuracy of each epoch."""
    model = build(config.model, dataset.shape, seed=config.train.seed).double()
    optimizer = make(model.parameters())
    x, y = dataset.standardize(dataset.train.images).double(), dataset.train.labels
    losses, accuracies = [], []
    for epoch in range(1, config.train.epochs + 1):
        loss_sum, correct = 0.0, 0
        for index in batches_of(config, len(y), epoch):
            optimizer.zero_grad()
            logits = model(x[index])
            loss = loss_of(config, logits, y[index])
            torch.autograd.backward(loss)
            if config.optimizer.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            loss_sum += loss.item() * len(index)
            correct += int((logits.argmax(1) == y[index]).sum())
        losses.append(loss_sum / len(y))
        accuracies.append(correct / len(y))
    return model, losses, accuracies


OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (
        {"name": "sgd", "lr": 0.1, "weight_decay": 1e-3},
        lambda ps: torch.optim.SGD(ps, lr=0.1, weight_decay=1e-3, foreach=False),
    ),
    "momentum, clipped": (
        {"name": "momentum", "lr": 0.1, "momentum": 0.8, "clip_norm": 0.5},
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.8, foreach=False),
    ),
    "adam": (
        {"name": "adam", "lr": 0.01},
        lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    ),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "train", [{}, {"loss": "mse"}, {"label_smoothing": 0.1}], ids=["plain", "mse", "smoothed"]
)
def test_two_epochs_equal_a_plain_torch_loop(
    model: str,
    optimizer: str,
    train: dict[str, Any],
    make_config: MakeConfig,
    make_dataset: MakeDataset,
) -> None:
    """200 images in batches of 32: the last one has eight, and is trained on as well."""
    section, make = OPTIMIZERS[optimizer]
    config = make_config(MODELS[model], section, precision="float64", **train)
    dataset = make_dataset(config)
    training = prepare(config, folder=Path("nowhere"), device=CPU, dataset=dataset)
    measurements = list(training.epochs())
    expected, losses, accuracies = trained_by_hand(config, dataset, make)
    found = training.state_dict()["engine"]["model"]
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9)
    assert [one.metrics["train_loss"] for one in measurements] == pytest.approx(losses, rel=1e-12)
    assert [one.metrics["train_accuracy"] for one in measurements] == accuracies


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("standardize", ["none", "channel", "zca"])
def test_evaluation_equals_a_loop_over_single_images(
    loss: str, standardize: str, make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(
        {"name": "mlp", "width": 12, "norm": "batch", "dropout": 0.5},
        data={"standardize": standardize},
        loss=loss,
        precision="float64",
        epochs=1,
    )
    dataset = make_dataset(config)
    training = prepare(config, folder=Path("nowhere"), device=CPU, dataset=dataset)
    (measurement,) = training.epochs()
    model = build(config.model, dataset.shape, seed=0).double().eval()
    model.load_state_dict(training.state_dict()["engine"]["model"])
    losses, hits = [], []
    with torch.no_grad():
        for image, label in zip(dataset.val.images, dataset.val.labels, strict=True):
            logits = model(dataset.standardize(image[None]).double())
            losses.append(loss_of(config, logits, label[None]).item())
            hits.append(int(logits.argmax(1)) == int(label))
    assert measurement.metrics["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert measurement.metrics["val_accuracy"] == sum(hits) / len(hits)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_steps_that_were_undone_leave_no_trace(
    name: str, make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    """What a CUDA graph's warm-up relies on: steps, undone in place, change nothing after."""
    config = make_config(MODELS["mlp"], {"name": name, "lr": 0.01, "weight_decay": 1e-3})
    dataset = make_dataset(config)
    plain, warmed = (Engine(config, dataset=dataset, device=CPU) for _ in range(2))
    before = warmed.state()
    addresses = {key: value.data_ptr() for key, value in warmed.model.state_dict().items()}
    for _ in range(3):
        warmed._step.full(warmed._order.following())
    assert not torch.equal(before["model"]["head.weight"], warmed.model.state_dict()["head.weight"])
    warmed.restore(before)
    for epoch in (1, 2):
        one, other = (
            engine.train(epoch=epoch, lr=0.01, before_batch=lambda: None)
            for engine in (plain, warmed)
        )
        assert (one.loss, one.accuracy) == (other.loss, other.accuracy)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, warmed.model.state_dict()[key])
    assert addresses == {k: v.data_ptr() for k, v in warmed.model.state_dict().items()}

"""A step on a CUDA device, without one: everything is on it, and the host never waits for it.

What it cannot show is left to the tests marked ``gpu``: values, the backward pass, memory and
whether the step can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn import functional
from training.conftest import MakeConfig
from training.fake_cuda import CUDA, FakeCuda, fake_cuda

from sweeper.config import DataShape, TrialConfig
from sweeper.config.optimizer import OptimizerName
from sweeper.data import Augment, Dataset, Part, Standardize
from sweeper.models import MODELS
from sweeper.training.cohort.engine import CohortEngine
from sweeper.training.cohort.rules import FAMILIES
from sweeper.training.engine import Engine
from sweeper.training.rows import RULES
from sweeper.training.update import RowUpdate, TorchUpdate

SHAPE = DataShape(3, 16, 16, 4)
BATCH, COUNT = 16, 40
AUGMENT = ["crop", "flip", "color_jitter", "rotation"]
SECTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 16, "norm": "batch", "dropout": 0.1},
    "mixer": {"patch": 4, "embed_dim": 8, "blocks": 1, "norm": "batch", "dropout": 0.1},
    "cnn": {"channels": [4, 4], "hidden": 8, "batch_norm": True, "dropout": 0.1},
    "resnet18": {},
    "vit": {"patch": 4, "embed_dim": 8, "blocks": 1, "heads": 2, "dropout": 0.1},
    "timm": {"architecture": "resnet10t"},
}

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_cuda(monkeypatch) as device:
        yield device


def configured(make: MakeConfig, model: str, optimizer: str = "adam", **train: Any) -> TrialConfig:
    section = {"name": optimizer, "lr": 0.01, "weight_decay": 0.01, "clip_norm": 1.0}
    augment = train.pop("augment", AUGMENT)
    options = {"batch_size": BATCH, "label_smoothing": 0.1, **train}
    return make({"name": model, **SECTIONS[model]}, section, {"augment": augment}, **options)


def blank(config: TrialConfig) -> Dataset:
    part = Part(
        images=torch.zeros(COUNT, *SHAPE[:3], dtype=torch.uint8, device=CUDA),
        labels=torch.zeros(COUNT, dtype=torch.int64, device=CUDA),
    )
    return Dataset(
        name="blank",
        source="",
        shape=SHAPE,
        classes=tuple("abcd"),
        train=part,
        val=part,
        test=part,
        standardize=Standardize(mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1)).to(CUDA),
        augment=Augment(config.data.augment),
        digest="",
    )


def stepped(config: TrialConfig, device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine after a full batch and a smaller one."""
    engine = Engine(config, dataset=blank(config), device=CUDA)
    assert engine.graph == "not used: there is no device"
    step = engine._step

    def backward(loss: Tensor) -> None:
        assert loss.requires_grad
        for parameter in step.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", blank_gradient)
    step.model.train()
    with device.step():
        step.full(engine._order.following())
        step.partial(engine._order.rest())
    return engine


def blank_gradient(loss: Tensor, leaves: list[Tensor], **_: bool) -> list[Tensor]:
    assert loss.requires_grad
    return [torch.zeros_like(leaf) for leaf in leaves]


EVERY_ONE = [
    *((model, "adam") for model in MODELS),
    *(("mlp", optimizer) for optimizer in get_args(OptimizerName) if optimizer != "adam"),
]


@pytest.mark.parametrize(("model", "optimizer"), EVERY_ONE)
def test_a_step_stays_on_the_device(
    model: str,
    optimizer: str,
    device: FakeCuda,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if model == "timm":
        pytest.importorskip("timm")
    engine = stepped(configured(make_config, model, optimizer), device, monkeypatch)
    assert engine.precision.name == "bfloat16"
    assert any("dropout" in name for name in device.operations) == ("dropout" in SECTIONS[model])
    update = engine._step.update
    in_rows = model in FAMILIES and optimizer in RULES
    assert isinstance(update, RowUpdate if in_rows else TorchUpdate)
    if isinstance(update, TorchUpdate):
        assert all(group.get("capturable", True) for group in update.optimizer.param_groups)
        for state in update.optimizer.state.values():
            assert all(each.device == CUDA for each in state.values() if isinstance(each, Tensor))
    evaluated_on_the_device(engine, device)


def evaluated_on_the_device(engine: Engine | CohortEngine, device: FakeCuda) -> None:
    with device.step():
        pauses = engine.evaluation(engine.part(engine._dataset.val))
        assert next(pauses) is None
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):  # waits for the sums
            next(pauses)


@pytest.mark.parametrize("precision", ["float16", "float32", "float64"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_so_it_does_in_every_precision_and_with_every_loss(
    loss: str,
    precision: str,
    device: FakeCuda,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured(make_config, "cnn", precision=precision, loss=loss, augment=[])
    engine = stepped(config, device, monkeypatch)
    update = engine._step.update
    scales = isinstance(update, TorchUpdate) and update.scaler is not None
    assert scales == (precision == "float16")


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_a_step_of_a_cohort_stays_on_the_device(
    model: str, device: FakeCuda, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every optimizer at once."""
    configs = [
        configured(make_config, model, optimizer, seed=seed, augment=["crop"])
        for seed, optimizer in enumerate(sorted(RULES))
    ]
    engine = CohortEngine(configs[0], dataset=blank(configs[0]), device=CUDA)
    engine.arrange([engine.seat(config) for config in configs])
    engine._configure([0.01] * len(configs))
    engine._template.train()

    monkeypatch.setattr(torch.autograd, "grad", blank_gradient)
    with device.step():
        engine._following()
        engine._step(engine._order_KN[:, : COUNT % BATCH])
    assert any("dropout" in name for name in device.operations)
    evaluated_on_the_device(engine, device)


def test_attention_in_a_cohort_has_a_backward_pass(
    device: FakeCuda, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention, or the plain one: under vmap the others do not keep what they need."""
    original, seen = functional.scaled_dot_product_attention, []

    def attention(*qkv: Tensor) -> Tensor:
        others = cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
        seen.append((cuda.flash_sdp_enabled(), any(others), {each.dtype for each in qkv}))
        return original(*qkv)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    config = configured(make_config, "vit", augment=[])
    engine = CohortEngine(config, dataset=blank(config), device=CUDA)
    engine.arrange([engine.seat(config), engine.seat(config)])
    engine._configure([0.01, 0.01])
    engine._template.train()
    monkeypatch.setattr(torch.autograd, "grad", blank_gradient)
    engine._following()
    assert seen[-1] == (True, False, {torch.bfloat16})


@pytest.mark.parametrize("mistake", ["read", "made", "brought", "counted"])
def test_a_mistake_would_be_seen(mistake: str, device: FakeCuda) -> None:
    x = torch.zeros(4, device=CUDA)
    found = (AssertionError, RuntimeError)
    with pytest.raises(found, match=r"cpu|_local_scalar_dense|nonzero"), device.step():
        match mistake:
            case "read":
                x.sum().item()
            case "made":
                torch.ones(4)
            case "brought":
                x.cpu()
            case _:
                x[x > 0]


@pytest.mark.parametrize("kind", ["none", "channel", "zca"])
def test_images_are_standardized_on_the_device(kind: Any, device: FakeCuda) -> None:
    images = torch.zeros(COUNT, *SHAPE[:3], dtype=torch.uint8, device=CUDA)
    standardize = Standardize.fit(images, kind)
    assert {buffer.device for buffer in standardize.buffers()} == {CUDA}
    with device.step():
        assert standardize.whole(images, torch.float32).device == CUDA

"""Optimizers against torch and by hand, schedules against torch's, losses by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import vmap

from sweeper.config import DataShape, ModelConfig, OptimizerConfig, TrainConfig
from sweeper.errors import UsageError
from sweeper.models import build
from sweeper.optim import make_loss, make_optimizer, make_schedule, set_lr

NAMES = ["sgd", "momentum", "nesterov", "adam", "adamw", "adadelta", "rmsprop"]


def one_parameter(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype))


def steps(
    config: OptimizerConfig, gradients: list[list[float]], *, capturable: bool = False
) -> list[Tensor]:
    """The parameter after a step with each of ``gradients``."""
    parameter = one_parameter()
    optimizer = make_optimizer(config, [parameter], capturable=capturable)
    after = []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        after.append(parameter.detach().clone())
    return after


START = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
G1, G2 = [0.5, -1.0, 2.0], [1.0, 0.25, -0.5]
G = torch.tensor([G1, G2], dtype=torch.float64)


# --- optimizers


def test_sgd_has_no_momentum() -> None:
    config = OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
    first, second = steps(config, [G1, G2])
    torch.testing.assert_close(first, START - 0.1 * (G[0] + 0.01 * START))
    torch.testing.assert_close(second, first - 0.1 * (G[1] + 0.01 * first))


@pytest.mark.parametrize(("momentum", "used"), [(None, 0.9), (0.5, 0.5), (0.0, 0.0)])
def test_momentum_sums_past_gradients(momentum: float | None, used: float) -> None:
    config = OptimizerConfig(name="momentum", lr=0.1, momentum=momentum)
    first, second = steps(config, [G1, G2])
    torch.testing.assert_close(first, START - 0.1 * G[0])
    torch.testing.assert_close(second, first - 0.1 * (used * G[0] + G[1]))


@pytest.mark.parametrize(("momentum", "used"), [(None, 0.9), (0.5, 0.5), (0.0, 0.0)])
def test_nesterov_looks_ahead(momentum: float | None, used: float) -> None:
    config = OptimizerConfig(name="nesterov", lr=0.1, momentum=momentum)
    first, second = steps(config, [G1, G2])
    torch.testing.assert_close(first, START - 0.1 * (G[0] + used * G[0]))
    velocity = used * G[0] + G[1]
    torch.testing.assert_close(second, first - 0.1 * (G[1] + used * velocity))


@pytest.mark.parametrize(("momentum", "beta1"), [(None, 0.9), (0.3, 0.3)])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_momentum_is_adams_beta1(name: Any, momentum: float | None, beta1: float) -> None:
    config = OptimizerConfig(
        name=name, lr=0.1, momentum=momentum, beta2=0.99, eps=1e-3, weight_decay=0.01
    )
    expected, mean, square = START, torch.zeros(3), torch.zeros(3)
    for count, (gradient, found) in enumerate(zip(G, steps(config, [G1, G2]), strict=True), 1):
        if name == "adam":
            gradient = gradient + 0.01 * expected
        else:
            expected = expected * (1 - 0.1 * 0.01)
        mean = beta1 * mean + (1 - beta1) * gradient
        square = 0.99 * square + 0.01 * gradient**2
        scale = (square / (1 - 0.99**count)).sqrt() + 1e-3
        expected = expected - 0.1 * mean / (1 - beta1**count) / scale
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("momentum", "used"), [(None, 0.0), (0.5, 0.5)])
def test_rmsprop_has_no_momentum_unless_asked(momentum: float | None, used: float) -> None:
    config = OptimizerConfig(name="rmsprop", lr=0.1, momentum=momentum)
    expected, square, velocity = START, torch.zeros(3), torch.zeros(3)
    for gradient, found in zip(G, steps(config, [G1, G2]), strict=True):
        square = 0.99 * square + 0.01 * gradient**2
        velocity = used * velocity + gradient / (square.sqrt() + 1e-8)
        expected = expected - 0.1 * velocity
        torch.testing.assert_close(found, expected)


def test_adadelta_scales_by_its_past_steps() -> None:
    config = OptimizerConfig(name="adadelta", lr=1.0, momentum=0.5)
    expected, square, past = START, torch.zeros(3), torch.zeros(3)
    for gradient, found in zip(G, steps(config, [G1, G2]), strict=True):
        square = 0.9 * square + 0.1 * gradient**2
        delta = (past + 1e-6).sqrt() / (square + 1e-6).sqrt() * gradient
        past = 0.9 * past + 0.1 * delta**2
        expected = expected - delta
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_capturable_optimizer_steps_like_the_other(name: Any) -> None:
    """Its learning rate is rounded to float32, hence the tolerance."""
    config = OptimizerConfig(name=name, lr=0.1, momentum=0.5, weight_decay=0.01)
    plain = steps(config, [G1, G2, G1])
    for found, expected in zip(steps(config, [G1, G2, G1], capturable=True), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_has_its_state_before_the_first_step(name: Any, capturable: bool) -> None:
    parameter = one_parameter()
    gradient = torch.ones(3, dtype=torch.float64)
    parameter.grad = gradient
    config = OptimizerConfig(name=name, momentum=0.5, weight_decay=0.1)
    optimizer = make_optimizer(config, [parameter], capturable=capturable)
    assert torch.equal(parameter, START)
    assert parameter.grad is gradient
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    held = {key: value for key, value in optimizer.state[parameter].items() if value is not None}
    assert bool(held) == (name != "sgd")
    assert all(not value.any() for value in held.values())
    optimizer.step()
    after = optimizer.state[parameter]
    assert all(after[key] is value for key, value in held.items()), "state was allocated anew"


@pytest.mark.parametrize("name", NAMES)
def test_a_first_step_that_loss_scaling_skips_leaves_nothing(name: Any) -> None:
    """It begins at a scale that most models overflow, and is halved until none does."""
    config = OptimizerConfig(name=name, lr=0.1, momentum=0.5, weight_decay=0.01)
    start = torch.ones(1000)
    skipped, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    scaler = torch.amp.GradScaler("cpu")
    junk = torch.full((1000,), 1e30)
    del junk  # what torch allocates next begins with these numbers
    by_scaling, by_itself = make_optimizer(config, [skipped]), make_optimizer(config, [plain])
    for gradient in (math.inf, 1.0, 0.5):
        skipped.grad = None
        scaler.scale((skipped * gradient).sum()).backward()
        scaler.step(by_scaling)
        scaler.update()
        if math.isfinite(gradient):
            plain.grad = torch.full((1000,), gradient)
            by_itself.step()
        torch.testing.assert_close(skipped, plain)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_can_be_set(name: Any, capturable: bool) -> None:
    parameter = one_parameter()
    optimizer = make_optimizer(
        OptimizerConfig(name=name, lr=0.1), [parameter], capturable=capturable
    )
    lr = optimizer.param_groups[0]["lr"]
    assert isinstance(lr, Tensor) == capturable
    set_lr(optimizer, 0.0)
    parameter.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(parameter, START), "a learning rate of zero must not move anything"
    set_lr(optimizer, 0.5)
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    if capturable:
        assert optimizer.param_groups[0]["lr"] is lr
    optimizer.step()
    assert not torch.equal(parameter, START)


def test_frozen_parameters_are_left_out() -> None:
    frozen, free = one_parameter().requires_grad_(False), one_parameter()
    optimizer = make_optimizer(OptimizerConfig(), [frozen, free])
    assert optimizer.param_groups[0]["params"] == [free]
    with pytest.raises(UsageError, match="must have parameters that require a gradient"):
        make_optimizer(OptimizerConfig(), [frozen])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_equals_eager_ones_from_the_first_on(name: Any) -> None:
    config = OptimizerConfig(name=name, lr=0.1, momentum=0.5, weight_decay=0.01)
    start = one_parameter(torch.float32).detach()
    eager, graphed = nn.Parameter(start.cuda()), nn.Parameter(start.cuda())
    plain = make_optimizer(config, [eager])
    captured = make_optimizer(config, [graphed], capturable=True)
    graphed.grad = torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for lr, gradient in ((0.1, G1), (0.1, G2), (0.05, G1)):
        set_lr(plain, lr)
        set_lr(captured, lr)
        eager.grad = torch.tensor(gradient, device="cuda")
        graphed.grad.copy_(eager.grad)
        plain.step()
        graph.replay()
        torch.testing.assert_close(graphed, eager)


# --- schedules


def rates(config: OptimizerConfig, epochs: int, metrics: list[dict[str, float]]) -> list[float]:
    schedule = make_schedule(config, epochs)
    found = []
    for measured in metrics:
        found.append(schedule.lr)
        schedule.step(measured)
    return found


def with_schedule(**schedule: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": "sgd", "lr": 0.1, "schedule": schedule})


def test_a_constant_rate_stays() -> None:
    assert rates(OptimizerConfig(lr=0.1), 5, [{}] * 7) == [0.1] * 7


@pytest.mark.parametrize(
    ("config", "scheduler"),
    [
        (
            with_schedule(name="exponential", gamma=0.9),
            lambda sgd: torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9),
        ),
        (
            with_schedule(name="cosine", min_lr=0.02),
            lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10, 0.02),
        ),
    ],
)
def test_rates_by_epoch_are_torchs(config: OptimizerConfig, scheduler: Any) -> None:
    sgd = torch.optim.SGD([one_parameter()], lr=0.1)
    reference = scheduler(sgd)
    expected = []
    for _ in range(11):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        reference.step()
    assert rates(config, 10, [{}] * 11) == pytest.approx(expected, rel=1e-12)


def test_a_cosine_starts_at_the_rate_ends_at_the_lowest_and_stays_there() -> None:
    found = rates(with_schedule(name="cosine", min_lr=0.02), 4, [{}] * 7)
    middle = 0.02 + 0.08 * (1 + math.cos(math.pi / 4)) / 2
    assert found[:3] == pytest.approx([0.1, middle, 0.06])
    assert found[4:] == pytest.approx([0.02] * 3)


NAN, INF = math.nan, math.inf
CURVES = {
    "falls, stalls, falls": [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4],
    "just under the threshold": [1.0, 0.99995, 0.9999, 0.99985, 0.9998, 0.99975, 0.9997, 0.9996],
    "not a number": [NAN, NAN, 0.5, NAN, NAN, NAN, 0.6, INF, 0.4, 0.5, 0.5, 0.5],
    "rises": [0.1 * step for step in range(12)],
    "zero": [0.0] * 12,
    "at once infinite": [INF] * 6 + [0.1] * 6,
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("monitor", ["val_loss", "val_accuracy"])
@pytest.mark.parametrize(("patience", "min_lr"), [(2, 0.0), (0, 0.003), (1, 0.0999999999)])
def test_a_plateau_is_torchs(curve: str, monitor: str, patience: int, min_lr: float) -> None:
    sgd = torch.optim.SGD([one_parameter()], lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        sgd,
        mode="max" if monitor == "val_accuracy" else "min",
        factor=0.3,
        patience=patience,
        min_lr=min_lr,
    )
    expected = []
    for value in CURVES[curve]:
        expected.append(sgd.param_groups[0]["lr"])
        reference.step(value)
    config = with_schedule(
        name="plateau", factor=0.3, patience=patience, monitor=monitor, min_lr=min_lr
    )
    assert rates(config, 99, [{monitor: value} for value in CURVES[curve]]) == expected


def test_a_plateau_without_its_metric_says_so() -> None:
    schedule = make_schedule(with_schedule(name="plateau", monitor="val_accuracy"), 5)
    with pytest.raises(UsageError, match=r"needs val_accuracy after every epoch.*val_loss"):
        schedule.step({"val_loss": 1.0})


@pytest.mark.parametrize("name", ["constant", "exponential", "cosine", "plateau"])
def test_a_schedule_goes_on_from_its_state(name: str) -> None:
    patience = {"patience": 1} if name == "plateau" else {}
    config = with_schedule(name=name, **patience)
    metrics = [{"val_loss": loss} for loss in (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5)]
    whole = rates(config, 8, metrics)
    assert (len(set(whole)) > 1) == (name != "constant")
    for stop in range(len(metrics)):
        first = make_schedule(config, 8)
        for measured in metrics[:stop]:
            first.step(measured)
        second = make_schedule(config, 8)
        second.load_state_dict(first.state_dict())
        found = []
        for measured in metrics[stop:]:
            found.append(second.lr)
            second.step(measured)
        assert found == whole[stop:]


# --- losses


LOSSES = [
    {"loss": loss, "label_smoothing": smoothing}
    for loss in ("cross_entropy", "mse")
    for smoothing in (0.0, 0.1)
]


def by_hand(train: TrainConfig, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """The loss of each example, [B]."""
    classes = logits_BK.shape[1]
    target_BK = torch.full_like(logits_BK, train.label_smoothing / classes)
    for row, label in enumerate(labels_B.tolist()):
        target_BK[row, label] += 1 - train.label_smoothing
    if train.loss == "mse":
        return ((logits_BK - target_BK) ** 2).sum(dim=1) / classes
    return -(target_BK * logits_BK.log_softmax(dim=1)).sum(dim=1)


@pytest.mark.parametrize("section", LOSSES)
def test_a_loss_is_the_mean_over_examples(section: dict[str, Any]) -> None:
    train = TrainConfig(**section)
    logits_BK = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels_B = torch.tensor([0, 3, 1, 2, 3, 3])
    expected_B = by_hand(train, logits_BK, labels_B)
    torch.testing.assert_close(make_loss(train, 4)(logits_BK, labels_B), expected_B.mean())
    each_B = make_loss(train, 4, per_example=True)(logits_BK, labels_B)
    torch.testing.assert_close(each_B, expected_B)


@pytest.mark.parametrize("section", LOSSES)
@pytest.mark.parametrize("per_example", [False, True])
def test_a_loss_runs_under_vmap_and_on_the_meta_device(
    section: dict[str, Any], per_example: bool
) -> None:
    loss = make_loss(TrainConfig(**section), 4, per_example=per_example)
    logits_MBK, labels_B = torch.randn(3, 6, 4), torch.tensor([0, 3, 1, 2, 3, 3])
    found = vmap(loss, in_dims=(0, None))(logits_MBK, labels_B)
    torch.testing.assert_close(found, torch.stack([loss(m, labels_B) for m in logits_MBK]))
    assert loss(logits_MBK[0].to("meta"), labels_B.to("meta")).shape == found.shape[1:]


@pytest.mark.parametrize("section", LOSSES)
def test_a_loss_of_half_precision_logits_is_computed_in_float32(section: dict[str, Any]) -> None:
    loss = make_loss(TrainConfig(**section), 4)
    logits_BK, labels_B = torch.randn(6, 4).bfloat16().requires_grad_(), torch.zeros(6).long()
    found = loss(logits_BK, labels_B)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(logits_BK.float(), labels_B))
    found.backward()
    assert logits_BK.grad is not None
    assert logits_BK.grad.dtype == torch.bfloat16


# --- together


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "section",
    [
        {"name": "mlp", "width": 64},
        {"name": "mixer", "patch": 2, "embed_dim": 16, "blocks": 2},
        {"name": "cnn", "channels": [8, 16], "kernel": 3, "hidden": 32},
        {"name": "vit", "patch": 2, "embed_dim": 16, "blocks": 2},
    ],
    ids=lambda section: section["name"],
)
def test_every_family_learns_digits(section: dict[str, Any], capturable: bool) -> None:
    images, labels = load_digits(return_X_y=True)
    x_BCHW = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    y_B = torch.tensor(labels)
    config = TypeAdapter(ModelConfig).validate_python(section)
    model = build(config, DataShape(1, 8, 8, 10), seed=0)
    optimizer = make_optimizer(OptimizerConfig(lr=4e-3), model.parameters(), capturable=capturable)
    loss = make_loss(TrainConfig(), 10)
    order = torch.Generator().manual_seed(0)
    for _ in range(8):
        for batch in torch.randperm(1400, generator=order).split(50):
            optimizer.zero_grad()
            loss(model(x_BCHW[batch]), y_B[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x_BCHW[1400:]).argmax(1) == y_B[1400:]).float().mean().item()
    assert accuracy > 0.75

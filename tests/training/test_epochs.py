"""What a training yields, epoch by epoch, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sweeper.config import TrainConfig, TrialConfig
from sweeper.data import Dataset, Part, load
from sweeper.errors import TrialDivergedError, UsageError
from sweeper.measurement import EPOCH_METRICS, FINAL_METRICS, Measurement
from sweeper.training import Interrupted, TrainingClosedError, best_device, prepare
from sweeper.training.base import Training
from sweeper.training.loop import NetworkTraining
from sweeper.training.precision import precision_of, widen_convolutions

CPU = torch.device("cpu")
MakeConfig = Callable[..., TrialConfig]
MakeDataset = Callable[..., Dataset]

NOWHERE = Path("there-is-no-such-folder")
TIMES = ("seconds", "val_seconds", "samples_per_s", "peak_memory_mib")


def ready(config: TrialConfig, dataset: Dataset, **options: Any) -> NetworkTraining:
    training = prepare(config, folder=NOWHERE, device=CPU, dataset=dataset, **options)
    assert isinstance(training, NetworkTraining)
    return training


def numbers(measurements: list[Measurement]) -> list[dict[str, float]]:
    """The metrics that a repetition has to repeat."""
    return [
        {name: value for name, value in one.metrics.items() if name not in TIMES}
        for one in measurements
    ]


def weights_of(training: NetworkTraining) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = training.state_dict()["engine"]["model"]
    return weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_one_measurement_an_epoch_with_every_metric(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(epochs=3)
    measurements = list(ready(config, make_dataset(config)).epochs())
    assert [one.epoch for one in measurements] == [1, 2, 3]
    for one in measurements:
        assert one.metrics.keys() == EPOCH_METRICS.keys()
        assert one.finite
        assert one.metrics["lr"] == 0.01
        assert 0 <= one.metrics["val_accuracy"] <= 1
        assert one.metrics["samples_per_s"] == pytest.approx(200 / one.metrics["seconds"])
        assert 10 < one.metrics["peak_memory_mib"] < 100_000


NOISY = {"name": "mlp", "width": 16, "layers": 2, "dropout": 0.3, "norm": "batch"}


def test_a_seed_repeats_a_training_bit_for_bit_with_dropout_and_augmentation(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(NOISY, data={"augment": ["crop", "flip"]}, epochs=3)
    dataset = make_dataset(config)
    first, second = ready(config, dataset), ready(config, dataset)
    torch.manual_seed(1)
    one = list(first.epochs())
    torch.manual_seed(2)
    other = list(second.epochs())
    assert numbers(one) == numbers(other)
    assert same(weights_of(first), weights_of(second))


def test_another_seed_gives_another_training(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    trainings = []
    for seed in (0, 1):
        config = make_config(seed=seed)
        training = ready(config, make_dataset(config))
        assert len(list(training.epochs())) == 2
        trainings.append(weights_of(training))
    assert not any(torch.equal(trainings[0][name], trainings[1][name]) for name in trainings[0])


def test_dropout_differs_between_the_epochs_of_a_seed(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    """With a learning rate that moves nothing, two epochs differ by order and dropout alone."""
    config = make_config(NOISY, {"name": "sgd", "lr": 1e-30})
    first, second = ready(config, make_dataset(config)).epochs()
    assert first.metrics["train_loss"] != second.metrics["train_loss"]


def test_training_leaves_torchs_generator_alone(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(NOISY, data={"augment": ["crop"]})
    before = torch.get_rng_state()
    assert list(ready(config, make_dataset(config)).epochs())
    assert torch.equal(torch.get_rng_state(), before)


def test_divergence_is_yielded_and_ends_the_training(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(optimizer={"name": "sgd", "lr": 1e30}, epochs=5)
    training = ready(config, make_dataset(config))
    measurements = list(training.epochs())
    assert len(measurements) == 1
    assert not measurements[0].finite
    with pytest.raises(TrialDivergedError, match="none of 1"):
        training.best_weights()


@dataclass(frozen=True, kw_only=True, eq=False)
class CountingPart(Part):
    """A part that counts how often its images are asked for."""

    asked: list[str]

    def __getattribute__(self, name: str) -> Any:
        if name == "images":
            super().__getattribute__("asked").append(name)
        return super().__getattribute__(name)


def test_the_test_set_is_read_by_test_alone_and_once(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config()
    dataset = make_dataset(config)
    asked: list[str] = []
    test = CountingPart(images=dataset.test.images, labels=dataset.test.labels, asked=asked)
    training = ready(config, replace(dataset, test=test))
    assert len(list(training.epochs())) == 2
    assert training.best_weights()
    assert asked == []
    final = training.test()
    assert asked
    count = len(asked)
    assert training.test() == final
    assert len(asked) == count
    assert final.keys() == FINAL_METRICS.keys()


@pytest.mark.parametrize("objective", [("val_accuracy", True), ("val_loss", False)])
def test_best_weights_are_those_of_the_best_validation_epoch(
    objective: tuple[str, bool], make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    """A rising learning rate is not among the schedules, so a large one has to do the harm."""
    config = make_config(NOISY, {"name": "adam", "lr": 0.3}, epochs=6, seed=3)
    training = ready(config, make_dataset(config), objective=objective)
    states, values = [], []
    for measurement in training.epochs():
        states.append(weights_of(training))
        values.append(measurement.metrics[objective[0]])
    best = values.index(max(values) if objective[1] else min(values))
    assert best < 5, "the test wants a best epoch before the last"
    assert same(training.best_weights(), states[best])
    final = training.test()
    assert final["best_epoch"] == best + 1
    assert same(weights_of(training), states[-1]), "test() leaves the last weights in place"
    assert final["test_loss"] != final["test_loss_last"]


def test_a_schedule_changes_the_learning_rate(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    optimizer = {"name": "sgd", "lr": 0.1, "schedule": {"name": "exponential", "gamma": 0.5}}
    config = make_config(optimizer=optimizer, epochs=3)
    rates = [one.metrics["lr"] for one in ready(config, make_dataset(config)).epochs()]
    assert rates == [0.1, 0.05, 0.025]


def test_layer_statistics_describe_the_weights(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(epochs=1, layer_statistics=True)
    training = ready(config, make_dataset(config))
    (measurement,) = training.epochs()
    weights = weights_of(training)
    matrices = [name for name, value in weights.items() if value.ndim == 2]
    assert len(matrices) == 2
    for name in matrices:
        found = measurement.metrics
        assert found[f"layers.{name}_mean"] == pytest.approx(weights[name].mean().item(), abs=1e-6)
        assert found[f"layers.{name}_std"] == pytest.approx(
            weights[name].std(correction=0).item(), rel=1e-5
        )
        rms = math.hypot(found[f"layers.{name}_grad_mean"], found[f"layers.{name}_grad_std"])
        norm = rms * math.sqrt(weights[name].numel())
        assert found[f"layers.{name}_grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 0


def test_an_interrupt_ends_the_epoch_between_two_batches(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(epochs=3)
    training = ready(config, make_dataset(config))
    asked = 0

    def interrupt() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    epochs = training.epochs(interrupt=interrupt)
    assert next(epochs).epoch == 1  # seven batches and one of validation
    with pytest.raises(Interrupted):
        next(epochs)
    assert asked == 11
    assert training.best_weights()


def test_closing_the_generator_frees_the_model(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(epochs=3)
    training = ready(config, make_dataset(config))
    engine = training._engine
    assert engine is not None
    model = weakref.ref(engine.model)
    del engine
    epochs = training.epochs()
    assert next(epochs).epoch == 1
    assert model() is not None
    epochs.close()
    gc.collect()
    assert model() is None
    for use in (training.test, training.best_weights, training.state_dict):
        with pytest.raises(TrainingClosedError):
            use()
    training.close()


def test_a_training_closed_after_its_last_epoch_can_be_tested(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(epochs=1)
    training = ready(config, make_dataset(config))
    epochs = training.epochs()
    assert next(epochs).epoch == 1
    epochs.close()
    assert training.test()["best_epoch"] == 1


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop"])
def test_a_restored_training_goes_on_as_if_nothing_had_happened(
    name: str, make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    schedule = {"name": "plateau", "patience": 0, "factor": 0.5}
    config = make_config(NOISY, {"name": name, "lr": 0.05, "schedule": schedule}, epochs=5)
    dataset = make_dataset(config)
    whole = ready(config, dataset)
    expected = list(whole.epochs())
    interrupted = ready(config, dataset)
    epochs = interrupted.epochs()
    started = [next(epochs), next(epochs)]
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    epochs.close()
    file.seek(0)
    resumed = ready(config, dataset)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    rest = list(resumed.epochs())
    assert [one.epoch for one in rest] == [3, 4, 5]
    assert numbers(started + rest) == numbers(expected)
    assert same(weights_of(resumed), weights_of(whole))
    assert same(resumed.best_weights(), whole.best_weights())
    assert resumed.test() == whole.test()


def test_a_state_stays_as_it_was_while_training_goes_on(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    """A checkpoint is written in the background, and the epochs after it may be better ones."""
    config = make_config(epochs=3)
    training = ready(config, make_dataset(config), objective=("train_loss", False))
    epochs = training.epochs()
    next(epochs)
    state = training.state_dict()
    then = copy.deepcopy(state)
    list(epochs)
    assert training.test()["best_epoch"] == 3
    torch.testing.assert_close(state, then, rtol=0, atol=0)
    resumed = ready(config, make_dataset(config), objective=("train_loss", False))
    resumed.load_state_dict(state)
    list(resumed.epochs())
    torch.testing.assert_close(state, then, rtol=0, atol=0)


def test_a_mixer_learns_digits(make_config: MakeConfig) -> None:
    model = {"name": "mixer", "patch": 2, "embed_dim": 16, "blocks": 2}
    config = make_config(model, {"name": "adam", "lr": 0.005}, epochs=8)
    training = prepare(config, folder=NOWHERE, device=CPU)
    last = list(training.epochs())[-1]
    assert last.metrics["val_accuracy"] > 0.9
    assert training.test()["test_accuracy"] > 0.9


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float64"])
def test_every_precision_learns(
    precision: str, make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(epochs=3, precision=precision)
    training = ready(config, make_dataset(config))
    first, _, last = training.epochs()
    assert last.metrics["train_loss"] < first.metrics["train_loss"]
    assert last.metrics["val_accuracy"] > 0.5
    assert training.notes["precision"] == precision


@pytest.mark.parametrize(
    ("kernel", "stride", "channels", "side"),
    [(3, 2, 64, 1), (5, 1, 128, 1), (7, 1, 256, 2), (3, 4, 64, 3)],
)
def test_kernels_that_meet_padding_only_have_their_gradient_in_bfloat16_too(
    kernel: int, stride: int, channels: int, side: int
) -> None:
    """oneDNN leaves parts of it as the memory was; what is freed here is what it gets next."""
    layer = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, bias=False)
    x_BCHW = torch.randn(17, channels, side, side)
    (expected,) = torch.autograd.grad(layer(x_BCHW).square().mean(), layer.parameters())
    precision = precision_of(TrainConfig(precision="bfloat16"), CPU)
    widen_convolutions(layer, precision)
    for _ in range(4):
        junk = [torch.full_like(expected, 1e30) for _ in range(3)]
        del junk
        with precision.forward():
            y_BCHW = layer(x_BCHW)
        (found,) = torch.autograd.grad(y_BCHW.float().square().mean(), layer.parameters())
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.std()))
    with precision.forward():
        assert layer(torch.randn(2, channels, 7, 7)).dtype == torch.bfloat16


class Scaled(nn.Conv2d):
    """A convolution of somebody's own, with an argument of its own."""

    def forward(self, x_BCHW: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x_BCHW) * scale


def test_a_convolution_of_ones_own_is_called_as_it_was() -> None:
    model = nn.ModuleList([Scaled(1, 1, 3), nn.Conv2d(1, 1, 3, padding=1)])
    widen_convolutions(model, precision_of(TrainConfig(precision="bfloat16"), CPU))
    x_BCHW = torch.zeros(2, 1, 5, 5)
    assert model[0](x_BCHW, 2.0).shape == (2, 1, 3, 3)
    assert model[1](input=x_BCHW).shape == x_BCHW.shape


def test_a_trial_in_bfloat16_has_them_too(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    model = {"name": "cnn", "channels": [4, 4], "hidden": 8}
    config = make_config(model, precision="bfloat16", epochs=1)
    training = ready(config, make_dataset(config))
    assert len(list(training.epochs())) == 1
    engine = training._open()[0]
    convolution = engine.model.stages[1][0]
    with engine.precision.forward():
        assert convolution(torch.zeros(1, 4, 4, 4)).dtype == torch.float32
        assert convolution(torch.zeros(1, 4, 5, 5)).dtype == torch.bfloat16


def test_clipping_bounds_what_a_step_moves(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    """Plain gradient descent moves at most learning rate times clip norm a step."""
    config = make_config(optimizer={"name": "sgd", "lr": 0.5, "clip_norm": 1e-3}, epochs=1)
    dataset = make_dataset(config)
    training = ready(config, dataset)
    before = weights_of(training)
    assert list(training.epochs())
    after = weights_of(training)
    moved = math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in after))
    steps = math.ceil(200 / 32)
    assert 0 < moved <= steps * 0.5 * 1e-3 * 1.001


def test_the_batch_may_be_larger_than_the_data(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(batch_size=1000)
    assert [one.finite for one in ready(config, make_dataset(config)).epochs()] == [True, True]


def test_a_single_image_left_over_does_not_break_batch_normalization(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(NOISY, epochs=1)
    training = ready(config, make_dataset(config, train=6 * 32 + 1))
    assert [one.finite for one in training.epochs()] == [True]
    assert weights_of(training)["layers.1.num_batches_tracked"] == 6


def test_notes_say_how_the_trial_runs(make_config: MakeConfig, make_dataset: MakeDataset) -> None:
    config = make_config()
    notes = ready(config, make_dataset(config)).notes
    assert notes["graph"] == "not used: a CUDA graph needs a CUDA device"
    assert notes["precision"] == "float32"
    assert notes["standardize"] == "once"
    assert notes["device"].startswith("cpu")


def test_a_graph_that_is_asked_for_needs_cuda(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config(graph="on")
    with pytest.raises(UsageError, match=r"train\.graph: on needs a CUDA device"):
        ready(config, make_dataset(config))


def test_parameters_counts_what_is_trained(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config()
    assert ready(config, make_dataset(config)).parameters == (64 * 16 + 16) + (16 * 4 + 4)


def test_a_data_set_elsewhere_is_refused(
    make_config: MakeConfig, make_dataset: MakeDataset
) -> None:
    config = make_config()
    with pytest.raises(UsageError, match="must be on meta, but it is on cpu"):
        prepare(config, folder=NOWHERE, device=torch.device("meta"), dataset=make_dataset(config))


def test_best_device_is_one_that_tensors_name() -> None:
    device = best_device()
    assert torch.zeros(1, device=device).device == device


def test_a_support_vector_machine_is_one_measurement(make_config: MakeConfig) -> None:
    config = make_config({"name": "svm"}, epochs=7)
    dataset = load(config.data, folder=NOWHERE, device=CPU)
    training: Training = prepare(config, folder=NOWHERE, device=CPU, dataset=dataset)
    with pytest.raises(UsageError, match="nothing was trained"):
        training.test()
    (measurement,) = training.epochs()
    assert measurement.epoch == 1
    assert measurement.metrics.keys() == EPOCH_METRICS.keys()
    assert measurement.metrics["val_accuracy"] > 0.95
    assert measurement.finite
    final = training.test()
    assert final.keys() == FINAL_METRICS.keys()
    assert final["test_accuracy"] > 0.95
    assert training.best_weights() == {}
    assert list(training.epochs()) == []


def test_images_cropped_to_another_size_are_trained_and_tested(make_config: MakeConfig) -> None:
    crop = {"name": "crop", "padding": 0, "size": 6}
    config = make_config({"name": "mlp", "width": 64}, data={"augment": [crop]}, epochs=3)
    training = prepare(config, folder=NOWHERE, device=CPU)
    assert training.dataset.shape == (1, 6, 6, 10)
    assert training.dataset.train.images.shape[-2:] == (8, 8)
    assert list(training.epochs())[-1].metrics["val_accuracy"] > 0.7
    assert training.test()["test_accuracy"] > 0.7

"""The captured step against the eager one, on a real GPU.

Compared in float64: a float32 network drifts from its twin by rounding alone. Both draw the same
random numbers, so dropout and augmentation are compared as exactly as the rest. Learning rates are
powers of two, which the tensor of a captured optimizer holds exactly.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sweeper.config import DataShape, TrialConfig
from sweeper.config.optimizer import OptimizerName
from sweeper.data import Dataset
from sweeper.training import CaptureError, best_device, estimate_s, prepare, update
from sweeper.training.capture import CapturedStep, _waiting_forbidden
from sweeper.training.loop import NetworkTraining
from sweeper.training.rows import RULES
from sweeper.training.turns import driven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
MakeConfig = Callable[..., TrialConfig]
MakeDataset = Callable[..., Dataset]

COLOUR = DataShape(3, 16, 16, 4)
BATCH, STEPS, REST = 16, 30, 5
LR = 2.0**-7
AUGMENT = ["crop", "flip", "color_jitter", "rotation"]

MLP = {"name": "mlp", "width": 32, "norm": "batch", "dropout": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "mixer": {"name": "mixer", "patch": 4, "embed_dim": 16, "blocks": 2, "dropout": 0.1},
    "mlp": MLP,
    "cnn": {"name": "cnn", "channels": [8, 8], "hidden": 32, "batch_norm": True, "dropout": 0.2},
    "vit": {"name": "vit", "patch": 4, "embed_dim": 16, "blocks": 2, "dropout": 0.1},
    "resnet18": {"name": "resnet18"},
}


@dataclass(kw_only=True)
class Trained:
    training: NetworkTraining
    history: list[dict[str, float]]

    def weights(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.training.state_dict()["engine"]["model"]
        return state

    def assert_equals(self, other: Trained, *, rtol: float = 1e-5) -> None:
        expected = other.weights()
        for name, value in self.weights().items():
            torch.testing.assert_close(value, expected[name], rtol=rtol, atol=1e-7)
        for mine, theirs in zip(self.history, other.history, strict=True):
            for metric in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
                assert mine[metric] == pytest.approx(theirs[metric], rel=rtol), metric


class Trainer:
    """Prepares and trains on the GPU."""

    def __init__(self, make_config: MakeConfig, make_dataset: MakeDataset) -> None:
        self._make_config, self._make_dataset = make_config, make_dataset

    def prepare(
        self,
        model: dict[str, Any],
        optimizer: dict[str, Any],
        *,
        augment: list[str] | None = None,
        count: int = BATCH * STEPS + REST,
        **train: Any,
    ) -> NetworkTraining:
        options = {"batch_size": BATCH, "epochs": 1, "precision": "float64", **train}
        config = self._make_config(model, optimizer, {"augment": augment or []}, **options)
        device = best_device()
        dataset = self._make_dataset(config, train=count, shape=COLOUR, device=device)
        training = prepare(config, folder=Path("nowhere"), device=device, dataset=dataset)
        assert isinstance(training, NetworkTraining)
        return training

    def __call__(self, *args: Any, **options: Any) -> Trained:
        training = self.prepare(*args, **options)
        history = [dict(measurement.metrics) for measurement in training.epochs()]
        return Trained(training=training, history=history)


@pytest.fixture
def train(make_config: MakeConfig, make_dataset: MakeDataset) -> Trainer:
    return Trainer(make_config, make_dataset)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("model", MODELS)
def test_thirty_captured_steps_and_the_rest_equal_eager_ones(
    model: str, optimizer: str, train: Trainer
) -> None:
    section = {"name": optimizer, "lr": LR, "weight_decay": 2.0**-10}
    captured = train(MODELS[model], section, augment=AUGMENT, graph="on")
    eager = train(MODELS[model], section, augment=AUGMENT, graph="off")
    assert captured.training.notes["graph"] == "captured"
    assert eager.training.notes["graph"] == "not used: train.graph is off"
    captured.assert_equals(eager)


@pytest.mark.parametrize("optimizer", sorted(RULES))
@pytest.mark.parametrize("model", ["mixer", "mlp", "cnn", "vit"])
def test_the_one_kernel_of_all_weights_gives_what_torchs_optimizer_gives(
    model: str, optimizer: str, train: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"name": optimizer, "lr": LR, "weight_decay": 2.0**-10, "clip_norm": 1.0}
    captured = train(MODELS[model], section, augment=AUGMENT, graph="on", epochs=2)
    assert captured.training.notes["graph"] == "captured"
    assert_in_rows(captured.training)
    monkeypatch.setattr(update, "in_rows", lambda *_: False)
    captured.assert_equals(train(MODELS[model], section, augment=AUGMENT, graph="off", epochs=2))


@pytest.mark.parametrize("model", ["mixer", "mlp", "cnn", "vit"])
def test_what_is_cast_beforehand_is_what_autocast_casts(
    model: str, train: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some steps of SGD: products may add in another order. The copy is that of the last step."""
    options = {"precision": "bfloat16", "count": 5 * BATCH + REST, "graph": "on"}
    section = {"name": "sgd", "lr": 2.0**-3}
    beforehand = train(MODELS[model], section, **options)
    of_step = assert_in_rows(beforehand.training)
    leaves, size = of_step._leaves, of_step._layout.lowered_size
    assert size
    assert torch.equal(leaves.lowered, of_step._numbers.weights[:, :size].bfloat16())
    monkeypatch.setattr(update, "in_rows", lambda *_: False)
    usual = train(MODELS[model], section, **options).weights()
    for name, value in beforehand.weights().items():
        torch.testing.assert_close(value, usual[name], rtol=0.05, atol=5e-3)


def assert_in_rows(training: NetworkTraining) -> update.RowUpdate:
    assert training._engine is not None
    found = training._engine._step.update
    assert isinstance(found, update.RowUpdate)
    assert found._optimizer._fused is not None
    return found


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_every_optimizer_can_be_captured(optimizer: str, train: Trainer) -> None:
    section = {"name": optimizer, "lr": LR, "weight_decay": 2.0**-10}
    train(MLP, section, graph="on").assert_equals(train(MLP, section, graph="off"))


def test_schedule_clipping_and_several_epochs_reach_the_graph(train: Trainer) -> None:
    schedule = {"name": "exponential", "gamma": 0.5}
    section = {"name": "momentum", "lr": 2.0**-4, "clip_norm": 0.25, "schedule": schedule}
    captured = train(MLP, section, augment=["crop"], epochs=3, graph="on")
    captured.assert_equals(train(MLP, section, augment=["crop"], epochs=3, graph="off"))
    assert [one["lr"] for one in captured.history] == [2.0**-4, 2.0**-5, 2.0**-6]


def test_without_a_rest_every_step_is_a_replay(train: Trainer) -> None:
    section = {"name": "adam", "lr": LR}
    options = {"count": BATCH * STEPS, "epochs": 2, "layer_statistics": True}
    captured = train(MLP, section, graph="on", **options)
    eager = train(MLP, section, graph="off", **options)
    captured.assert_equals(eager)
    gradients = [name for name in captured.history[-1] if name.endswith("_grad_norm")]
    assert len(gradients) == 3
    for name in gradients:
        assert captured.history[-1][name] == pytest.approx(eager.history[-1][name], rel=1e-5)


def test_a_captured_training_repeats_bit_for_bit(train: Trainer) -> None:
    one, other = (
        train(MLP, {"name": "adam", "lr": LR}, augment=AUGMENT, graph="on", precision="float32")
        for _ in range(2)
    )
    expected = other.weights()
    assert all(torch.equal(value, expected[name]) for name, value in one.weights().items())


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("model", MODELS)
def test_every_precision_is_captured_and_learns(model: str, precision: str, train: Trainer) -> None:
    section = {"name": "adam", "lr": 2.0**-9}
    trained = train(MODELS[model], section, epochs=8, graph="on", precision=precision)
    first, last = trained.history[0], trained.history[-1]
    assert last["train_loss"] < first["train_loss"]
    assert last["val_accuracy"] > 0.5  # of four classes


def test_loss_scaling_of_an_optimizer_that_is_not_fused_stays_eager(train: Trainer) -> None:
    section = {"name": "adadelta", "lr": 1.0}
    trained = train(MLP, section, precision="float16", graph="auto", epochs=2)
    assert "unless the optimizer is fused" in trained.training.notes["graph"]
    assert all(one["train_loss"] < 10 for one in trained.history)
    with pytest.raises(CaptureError, match="unless the optimizer is fused"):
        train.prepare(MLP, section, precision="float16", graph="on")


def test_a_batch_larger_than_the_data_stays_eager(train: Trainer) -> None:
    trained = train(MLP, {"name": "sgd", "lr": LR}, batch_size=1000)
    assert trained.training.notes["graph"].endswith("the training images do not fill one batch")


WAITING = '''
import torch
from torch import nn

class Waiting(nn.Module):
    """Looks at a value on the host, which no graph can hold."""
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 4)
        self.dropout = nn.Dropout(0.2)
    def forward(self, x):
        x = self.dropout(x.flatten(1))
        return self.linear(x if x.abs().max().item() > 0 else x + 1)

def make(**arguments):
    return Waiting()
'''


def test_a_model_that_waits_for_the_device_is_trained_eagerly_with_the_reason(
    train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waiting_model.py").write_text(WAITING)
    monkeypatch.syspath_prepend(str(tmp_path))
    model, section = {"name": "waiting_model:make"}, {"name": "adam", "lr": LR}
    fallen_back = train(model, section, augment=["flip"], graph="auto")
    assert fallen_back.training.notes["graph"].startswith("not used: the training step cannot be")
    fallen_back.assert_equals(train(model, section, augment=["flip"], graph="off"))
    with pytest.raises(CaptureError, match="cannot be captured"):
        train.prepare(model, section, graph="on")
    # The failed attempt must not have spoilt the device for what comes after.
    assert train(MLP, section, graph="on").training.notes["graph"] == "captured"


@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("model", MODELS)
def test_the_host_never_waits_within_an_epoch(model: str, graph: str, train: Trainer) -> None:
    training = train.prepare(
        MODELS[model],
        {"name": "adam", "lr": LR, "clip_norm": 1.0},
        augment=AUGMENT,
        precision="bfloat16",
        graph=graph,
    )
    engine = training._engine
    assert engine is not None
    engine.train(epoch=1, lr=LR, before_batch=lambda: None)  # cuDNN and cuBLAS get ready
    engine._order.rewind()
    with _waiting_forbidden():
        driven(engine._all_batches(), lambda: None)


@pytest.mark.parametrize("model", MODELS)
def test_compiled_and_captured_steps_equal_eager_ones(model: str, train: Trainer) -> None:
    section = {"name": "adamw", "lr": LR}
    compiled = train(MODELS[model], section, augment=AUGMENT, graph="on", compile="on", epochs=2)
    assert compiled.training.notes["graph"] == "captured"
    assert compiled.training.notes["compile"].startswith("compiled in")
    eager = train(MODELS[model], section, augment=AUGMENT, graph="off", epochs=2)
    compiled.assert_equals(eager, rtol=1e-4)


@pytest.mark.parametrize("model", ["mixer", "cnn"])
def test_a_compiled_training_repeats_bit_for_bit(model: str, train: Trainer) -> None:
    section, options = {"name": "adam", "lr": LR}, {"precision": "auto", "compile": "on"}
    one, other = (train(MODELS[model], section, graph="on", **options) for _ in range(2))
    expected = other.weights()
    assert all(torch.equal(value, expected[name]) for name, value in one.weights().items())


def test_a_restored_training_goes_on_in_a_graph_of_its_own(train: Trainer) -> None:
    section = {"name": "adam", "lr": LR}
    whole = train(MLP, section, augment=["crop"], epochs=4, graph="on")
    begun = train.prepare(MLP, section, augment=["crop"], epochs=4, graph="on")
    epochs = begun.epochs()
    assert [next(epochs).epoch, next(epochs).epoch] == [1, 2]
    state = begun.state_dict()
    epochs.close()
    resumed = train.prepare(MLP, section, augment=["crop"], epochs=4, graph="on")
    resumed.load_state_dict(state)
    history = [dict(measurement.metrics) for measurement in resumed.epochs()]
    assert resumed.notes["graph"] == "captured"
    Trained(training=resumed, history=whole.history[:2] + history).assert_equals(whole)


def test_closing_frees_the_memory_of_model_and_graph(train: Trainer) -> None:
    big = {"name": "mlp", "width": 2048, "layers": 2}
    train(MLP, {"name": "adam", "lr": LR})  # cuBLAS keeps its workspace
    gc.collect()
    before = torch.cuda.memory_allocated()
    training = train.prepare(big, {"name": "adam", "lr": LR}, epochs=3, graph="on")
    epochs = training.epochs()
    assert next(epochs).epoch == 1
    held = torch.cuda.memory_allocated() - before
    epochs.close()
    training.dataset = None  # type: ignore[assignment] # the data set outlives a training
    gc.collect()
    left = torch.cuda.memory_allocated() - before
    assert held > 100 * 2**20
    assert left < held / 20


def test_peak_memory_is_that_of_the_trial(train: Trainer) -> None:
    """Beside what is kept for others: cuBLAS has a workspace for every stream it ever ran on."""

    def own(model: dict[str, Any]) -> float:
        gc.collect()
        kept = torch.cuda.memory_allocated() / 2**20
        history = train(model, {"name": "adam", "lr": LR}).history
        return history[-1]["peak_memory_mib"] - kept

    own({"name": "mlp", "width": 16})  # where cuBLAS has none yet
    big = own({"name": "mlp", "width": 2048, "layers": 2})
    assert 0 < own({"name": "mlp", "width": 8}) < big / 2


def test_time_is_estimated_with_the_graph(make_config: MakeConfig) -> None:
    config = make_config({"name": "mlp"}, data={"name": "mnist"}, batch_size=128, epochs=2)
    seconds = estimate_s(config, device=torch.device("cuda"))
    assert seconds is not None
    assert 0.01 < seconds < 100


def test_a_capture_that_breaks_half_way_leaves_the_device_as_it_was() -> None:
    """Not even ended properly, which is what older versions of torch do not get over."""
    device, calls = best_device(), itertools.count()
    x = torch.ones(1000, device=device)

    def step() -> None:
        x.copy_(functional.dropout(torch.ones_like(x)))
        if next(calls) == 3:  # three come before
            torch.cuda.synchronize()

    def undo() -> None:
        x.fill_(1)

    with pytest.raises(CaptureError, match="captur"):
        CapturedStep(step, undo=undo, device=device)
    assert torch.equal(x, torch.ones_like(x))
    torch.cuda.empty_cache()
    step()
    assert set(x.unique().tolist()) == {0.0, 2.0}
    again = CapturedStep(step, undo=undo, device=device)
    again.replay()
    assert set(x.unique().tolist()) == {0.0, 2.0}
    again.close()

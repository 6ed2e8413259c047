"""One worker, in this process, on real digits: how trials end and what is said of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worker_bench import Bench

from sweeper.checkpoints import TrialCheckpoints
from sweeper.errors import DataNotFoundError
from sweeper.measurement import EPOCH_METRICS, FINAL_METRICS, Measurement
from sweeper.store import (
    recovery,
    studies,
)
from sweeper.worker import flattened


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    return lambda **sections: Bench(tmp_path, **sections)


def test_a_study_is_trained_to_its_end(bench: Callable[..., Bench]) -> None:
    found = bench()
    found.worker.run()
    now = found.now
    assert now.counts["complete"] == 2
    for row in now.rows:
        assert row.worker == "me"
        assert row.outcome == "completed"
        assert set(FINAL_METRICS) <= set(row.metrics)
        assert row.values[0] == row.metrics["max_val_accuracy"]
        assert row.model_parameters == 64 * 16 + 16 + 16 * 10 + 10


def test_every_trial_is_a_run_with_one_point_an_epoch(bench: Callable[..., Bench]) -> None:
    found = bench()
    found.worker.run()
    run = found.tracker.runs["small/0"]
    assert (run.name, run.experiment, run.status) == ("0000", "small", "FINISHED")
    assert run.params["optimizer.lr"] == repr(found.now.rows[0].params["optimizer.lr"])
    assert run.params["train.epochs"] == "3"
    for metric in EPOCH_METRICS:
        assert sorted(run.metrics[metric]) == [1, 2, 3], metric
    assert run.tags["sweeper.state"] == "complete"
    assert run.tags["sweeper.trial"] == "0"
    assert run.metrics["test_accuracy"]
    assert run.datasets[0]["name"] == "digits"


def test_weights_of_the_best_trial_are_kept(bench: Callable[..., Bench]) -> None:
    from safetensors.torch import load

    found = bench()
    found.worker.run()
    best = found.now.best
    assert best is not None
    content = found.tracker.runs[f"small/{best.number}"].files["weights/weights.safetensors"]
    assert set(load(content)) == {"layers.0.weight", "layers.0.bias", "head.weight", "head.bias"}


def test_a_trial_that_diverges_is_a_bad_result(bench: Callable[..., Bench]) -> None:
    found = bench(
        parameters={"optimizer.lr": {"values": [1.0e38, 0.01]}},
        search={"sampler": "grid"},
        optimizer={"name": "sgd"},
    )
    found.worker.run()
    assert [row.outcome for row in found.now.rows] == ["diverged", "completed"]
    assert [row.state for row in found.now.rows] == ["pruned", "complete"]


def test_a_configuration_that_does_not_fit_fails_alone(bench: Callable[..., Bench]) -> None:
    found = bench(
        model={"name": "mixer", "embed_dim": 8, "blocks": 1},
        parameters={"model.patch": {"values": [3, 4]}},
        search={"sampler": "grid"},
    )
    found.worker.run()
    assert [row.outcome for row in found.now.rows] == ["invalid", "completed"]
    assert "patch must divide the 8x8 image" in (found.now.rows[0].error or "")


def test_a_model_that_raises_fails_with_its_traceback(bench: Callable[..., Bench]) -> None:
    found = bench(model={"name": "tests.own_models:broken"}, search={"trials": 1})
    found.worker.run()
    row = found.now.rows[0]
    assert row.outcome == "crashed"
    assert "ZeroDivisionError" in (row.error or "")
    assert found.tracker.runs["small/0"].status == "FAILED"


def test_missing_data_end_the_worker_and_keep_the_trial(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    found = bench(data={"name": "image_folder", "root": str(tmp_path / "nowhere")})
    with pytest.raises(DataNotFoundError, match="nowhere"):
        found.worker.run()
    assert found.now.counts["waiting"] == 2


def test_a_signal_puts_the_trial_back_after_its_epoch(bench: Callable[..., Bench]) -> None:
    found = bench(search={"trials": 1})

    def log(key: str, metrics: object, step: int, timestamp_ms: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    found.signals.install()
    original, found.tracker.log = found.tracker.log, log  # type: ignore[method-assign]
    try:
        assert not found.worker.run()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    row = found.now.rows[0]
    assert (row.state, row.epoch, row.attempt) == ("waiting", 1, 2)
    assert found.tracker.runs["small/0"].status == "KILLED"

    found.tracker.log = original  # type: ignore[method-assign]
    found.signals.count = 0
    assert found.worker.run()
    row = found.now.rows[0]
    assert (row.state, row.attempt) == ("complete", 2)
    run = found.tracker.runs["small/0"]
    assert sorted(run.metrics["val_loss"]) == [1, 2, 3]  # the first again, from the checkpoint
    assert run.tags["sweeper.resumed"] == "attempt 2 after epoch 1"


HARD = {
    "data": {"name": "digits", "limit": 300, "augment": [{"name": "crop", "padding": 1}]},
    "model": {"name": "mlp", "width": 16, "layers": 2, "dropout": 0.2, "norm": "batch"},
    "optimizer": {"name": "nesterov", "schedule": {"name": "cosine"}},
    "train": {"epochs": 6, "batch_size": 50, "precision": "float32"},
    "search": {"trials": 1, "sampler": "random"},
}
TIMES = {"seconds", "val_seconds", "samples_per_s", "peak_memory_mib"}


def numbers(found: Bench) -> tuple[object, ...]:
    """All that a trial gave, but for times and memory."""
    from sweeper.measurement import SUMMARY_METRICS

    times = TIMES | {name for name, (metric, _) in SUMMARY_METRICS.items() if metric in TIMES}
    run = found.tracker.runs["small/0"]
    row = next(row for row in found.now.rows if row.state == "complete")
    epochs = {
        name: {step: value for step, (value, _) in series.items()}
        for name, series in run.metrics.items()
        if name not in times
    }
    metrics = {name: value for name, value in row.metrics.items() if name not in times}
    return row.values, dict(row.history), metrics, epochs, run.files


def at_every_epoch(
    found: Bench, monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]
) -> None:
    """Call ``act`` with the number of an epoch of the first trial once it is begun."""
    from sweeper.training.inputs import Order

    batches = Order.batches

    def beginning(order: Order) -> object:
        act(len(found.tracker.runs["small/0"].metrics.get("val_loss", {})) + 1)
        return batches(order)

    monkeypatch.setattr(Order, "batches", beginning)


def keep_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints after every epoch, however long copying and the disk take."""
    write = TrialCheckpoints.write

    def whole(kept: TrialCheckpoints, *args: Any) -> None:
        write(kept, *args)
        kept.wait()

    monkeypatch.setattr(TrialCheckpoints, "write", whole)
    monkeypatch.setattr(TrialCheckpoints, "due", lambda *_: True)


@pytest.mark.parametrize("ended_by", ["signal", "grace", "loss"])
def test_a_broken_trial_gives_the_numbers_of_one_never_broken(
    tmp_path: Path, ended_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bench(tmp_path / "whole", **HARD)
    whole.worker.run()

    broken = Bench(
        tmp_path / "broken", **HARD, faults={"grace_s": 0 if ended_by == "grace" else 30}
    )
    original = broken.tracker.log
    begun: list[int] = []

    def begin(epoch: int) -> None:
        begun.append(epoch)
        if ended_by == "grace" and begun == [1, 2, 3, 4, 5]:  # the fifth is then repeated
            broken.signals.stop()

    def log(key: str, metrics: dict[str, float], step: int, timestamp_ms: int) -> None:
        original(key, metrics, step, timestamp_ms)
        if step != 4:
            return
        if ended_by == "loss":
            assert recovery.lose_trials_of(broken.store, broken.study.id, "me")
            broken.tracker.log = original  # type: ignore[method-assign]
        elif ended_by == "signal":
            broken.signals.stop()

    at_every_epoch(broken, monkeypatch, begin)
    keep_every_epoch(monkeypatch)
    broken.tracker.log = log  # type: ignore[method-assign]
    broken.worker.run()
    if ended_by != "loss":
        first = list(begun)
        assert first == ([1, 2, 3, 4] if ended_by == "signal" else [1, 2, 3, 4, 5])
        assert sorted(broken.tracker.runs["small/0"].metrics["val_loss"]) == [1, 2, 3, 4]
        assert broken.now.rows[0].state == "waiting"
        kept = [file.name for file in (tmp_path / "broken/checkpoints").rglob("*.ckpt")]
        assert max(kept) == "epoch-000004.ckpt"
        broken.signals.count = 0
        broken.tracker.log = original  # type: ignore[method-assign]
        broken.worker.run()
        assert begun == [*first, 5, 6]

    run = broken.tracker.runs["small/0"]
    assert "after epoch" in run.tags["sweeper.resumed"]
    assert sorted(run.metrics["val_loss"]) == [1, 2, 3, 4, 5, 6]
    assert numbers(broken) == numbers(whole)
    assert not list((tmp_path / "broken/checkpoints").rglob("*.ckpt"))


def test_the_time_of_a_broken_trial_counts_from_its_first_attempt(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, now = bench(search={"trials": 1}), time.time
    original = found.tracker.log

    def log(key: str, metrics: object, step: int, timestamp_ms: int) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + 1000)
        found.signals.stop()

    found.tracker.log = log  # type: ignore[method-assign]
    found.worker.run()
    found.tracker.log = original  # type: ignore[method-assign]
    found.signals.count = 0
    found.worker.run()
    row = found.now.rows[0]
    assert (row.outcome, row.attempt) == ("completed", 2)
    assert 1000 < (row.seconds or 0) < 2000


@pytest.mark.parametrize("at", ["best", "last"])
def test_a_value_and_the_best_epoch_are_the_objectives(
    bench: Callable[..., Bench], at: str
) -> None:
    """Of a loss that is to be as high as it can, the first epoch is the best one."""
    found = bench(
        objective={"metric": "val_loss", "direction": "maximize", "at": at}, search={"trials": 1}
    )
    found.worker.run()
    row = found.now.rows[0]
    assert row.history[1] == max(row.history.values()) > row.history[3]
    assert row.values == (row.history[1 if at == "best" else 3],)
    assert row.metrics["best_epoch"] == 1


def test_a_cancelled_study_ends_trials_at_the_next_epoch(bench: Callable[..., Bench]) -> None:
    from sweeper.store import Control

    found = bench(
        search={"trials": 2}, train={"epochs": 20_000, "batch_size": 50}, faults={"heartbeat_s": 1}
    )
    asked: list[int] = []

    def log(key: str, metrics: object, step: int, timestamp_ms: int) -> None:
        if step == 1:
            studies.ask(found.store, found.study.id, Control.CANCEL)
        asked.append(step)

    found.tracker.log = log  # type: ignore[method-assign]
    found.worker.run()
    assert [row.outcome for row in found.now.rows] == ["cancelled", None]
    assert len(asked) < 20_000


def test_pruned_trials_end_early_and_their_test_set_is_not_read(
    bench: Callable[..., Bench],
) -> None:
    found = bench(
        search={
            "sampler": "grid",
            "pruner": {"name": "threshold", "lower": 0.99, "min_epochs": 1},
        },
        parameters={"optimizer.lr": {"values": [1.0e-5]}},
    )
    found.worker.run()
    row = found.now.rows[0]
    assert (row.outcome, row.epoch) == ("pruned", 1)
    assert "test_accuracy" not in row.metrics


def test_several_objectives_are_all_stored(bench: Callable[..., Bench]) -> None:
    found = bench(objective=["val_accuracy", "seconds"], search={"trials": 2})
    found.worker.run()
    assert [len(row.values) for row in found.now.rows] == [2, 2]


def test_the_same_study_gives_the_same_numbers(tmp_path: Path) -> None:
    def accuracies(folder: str) -> list[float]:
        found = Bench(tmp_path / folder, search={"trials": 3, "sampler": "tpe"})
        found.worker.run()
        return [row.metrics["val_loss"] for row in found.now.rows]

    assert accuracies("a") == accuracies("b")


def test_flattened_has_dotted_names() -> None:
    assert flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}


def test_a_measurement_with_infinite_loss_is_not_finite() -> None:
    assert not Measurement(epoch=1, metrics={"train_loss": float("inf")}).finite
    assert Measurement(epoch=1, metrics={"train_loss": 1.0}).finite

"""What a trial goes on from where a disk was full, or a checkpoint is not what it should be."""

from __future__ import annotations

import hashlib
import io
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_bench import Bench

from sweeper.errors import StoreRefusedError
from sweeper.store import held
from sweeper.worker.attempt import Attempt

ONE: dict[str, Any] = {"search": {"trials": 1, "sampler": "random"}}


def history(found: Bench) -> dict[int, float]:
    (row,) = found.now.rows
    assert row.state == "complete"
    return dict(row.history)


@pytest.mark.parametrize("late", [False, True])
def test_a_full_disk_of_the_store_is_no_lost_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    """Where nothing is pruned a refused report is known some time, at the latest at the end."""
    whole = Bench(tmp_path / "whole", **ONE)
    whole.worker.run()
    found = Bench(tmp_path / "full", **ONE, faults={"checkpoint_s": 1000})
    report_all, end = held.report_all, Attempt.end
    trained = threading.Event()

    def ended(attempt: Attempt, *words: Any) -> None:
        trained.set()
        end(attempt, *words)

    def full(store: Any, reports: dict[int, dict[int, float]]) -> set[int]:
        if any(2 in series for series in reports.values()):
            assert not late or trained.wait(60)
            raise StoreRefusedError("the database or disk is full")
        return report_all(store, reports)

    monkeypatch.setattr(held, "report_all", full)
    monkeypatch.setattr(Attempt, "end", ended)
    with caplog.at_level(logging.INFO), pytest.raises(StoreRefusedError, match="is full"):
        found.worker.run()
    assert "given to another worker" not in caplog.text
    monkeypatch.setattr(held, "report_all", report_all)
    (row,) = found.now.rows
    assert (row.state, row.attempt) == ("waiting", 2)
    found.worker.run()
    resumed = found.tracker.runs["small/0"].tags["sweeper.resumed"]
    epochs = ["attempt 2 after epoch 3"] if late else [f"attempt 2 after epoch {n}" for n in (2, 3)]
    assert resumed in epochs
    assert history(found) == history(whole)


def spoil(file: Path) -> None:
    """A whole checkpoint, checksum and all, that lacks a part of the trial's state."""
    header, _, body = file.read_bytes().partition(b"\n")
    content = torch.load(io.BytesIO(body), weights_only=True)
    del content["training"]["schedule"]
    stream = io.BytesIO()
    torch.save(content, stream)
    magic, digest, _ = header.split()
    checksum = hashlib.sha256(stream.getvalue()).hexdigest().encode()
    file.write_bytes(b" ".join([magic, digest, checksum]) + b"\n" + stream.getvalue())


@pytest.mark.parametrize(("spoiled", "goes_on"), [(1, "after epoch 1"), (2, None)])
def test_a_checkpoint_that_does_not_fit_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoiled: int, goes_on: str | None
) -> None:
    whole = Bench(tmp_path / "whole", **ONE)
    whole.worker.run()
    found = Bench(tmp_path / "spoiled", **ONE, faults={"checkpoint_s": 0})
    log = found.tracker.log

    def stop_after_two(key: str, metrics: dict[str, float], step: int, time_ms: int) -> None:
        log(key, metrics, step, time_ms)
        if step == 2:
            found.signals.stop()

    found.tracker.log = stop_after_two  # type: ignore[method-assign]
    found.worker.run()
    files = sorted((tmp_path / "spoiled/checkpoints").rglob("*.ckpt"), reverse=True)
    assert [file.name for file in files] == ["epoch-000002.ckpt", "epoch-000001.ckpt"]
    for file in files[:spoiled]:
        spoil(file)
    found.tracker.log = log  # type: ignore[method-assign]
    found.signals.count = 0
    with caplog.at_level(logging.WARNING):
        found.worker.run()
    assert caplog.text.count("is set aside: it does not fit: KeyError: 'schedule'") == spoiled
    resumed = found.tracker.runs["small/0"].tags.get("sweeper.resumed")
    assert resumed == (None if goes_on is None else f"attempt 2 {goes_on}")
    assert history(found) == history(whole)


def test_a_pruner_knows_the_epochs_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first epoch after it, though what it reads of the store may be a second old."""
    search = {**ONE["search"], "pruner": {"name": "median", "min_epochs": 1}}
    found = Bench(tmp_path, search=search, train={"epochs": 4, "batch_size": 50})
    asked: list[tuple[int, dict[int, float]]] = []

    def ask(_store: Any, _study: Any, _claimed: Any, epoch: int, told: Any) -> bool:
        asked.append((epoch, dict(told)))
        if epoch == 2:
            found.signals.stop()
        return False

    monkeypatch.setattr(held, "should_prune", ask)
    found.worker.run()
    found.signals.count = 0
    found.worker.run()
    values = history(found)
    assert found.tracker.runs["small/0"].tags["sweeper.resumed"] == "attempt 2 after epoch 2"
    assert asked == [(epoch, {e: values[e] for e in range(1, epoch + 1)}) for epoch in (1, 2, 3)]

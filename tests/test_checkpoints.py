"""Checkpoints: whole or set aside, the last two, anywhere that fsspec reaches, never in the way."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper import checkpoints
from sweeper.checkpoints import Checkpoint, Epoch, TrialCheckpoints, refuse_unusable
from sweeper.errors import MissingExtraError, OutOfReachError, UsageError
from sweeper.measurement import Measurement


class Counting:
    """Something whose state is one tensor and one number."""

    def __init__(self, epoch: int = 0, *, size: int = 100) -> None:
        self.epoch, self.size = epoch, size

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "weights": torch.full((self.size,), float(self.epoch))}


def history(epochs: int) -> list[Epoch]:
    return [
        Epoch(measurement=Measurement(epoch=i, metrics={"val_loss": 1 / i}), time_ms=1000 + i)
        for i in range(1, epochs + 1)
    ]


def opened(place: str | Path, digest: str = "d", **options: Any) -> TrialCheckpoints:
    return TrialCheckpoints(
        str(place), "study-1", 7, digest=digest, **{"every": 1, "at_most_s": 0.0, **options}
    )


def write(kept: TrialCheckpoints, epoch: int) -> None:
    kept.write(Counting(epoch), history(epoch), 2.5)  # type: ignore[arg-type]
    kept.wait()


def read(kept: TrialCheckpoints) -> Checkpoint:
    found = kept.latest()
    assert found is not None
    return found


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, and a file system that fsspec reaches by URL."""
    return str(tmp_path / "it's here") if request.param == "folder" else f"memory://{uuid.uuid4()}"


def test_what_is_written_is_read_back(place: str) -> None:
    assert opened(place).latest() is None
    write(opened(place), 3)
    found = read(opened(place))
    assert found.epochs == tuple(history(3))
    assert found.seconds == 2.5
    assert found.training["epoch"] == 3
    assert torch.equal(found.training["weights"], torch.full((100,), 3.0))


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    for epoch in (8, 9, 10, 11):
        write(kept, epoch)
    names = sorted(file.name for file in (tmp_path / "study-1/000007").iterdir())
    assert names == ["epoch-000010.ckpt", "epoch-000011.ckpt"]
    assert read(opened(tmp_path)).training["epoch"] == 11


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = opened(tmp_path)
    write(kept, 1)
    write(kept, 2)
    file = tmp_path / "study-1/000007/epoch-000002.ckpt"
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-400] ^= 1
    file.write_bytes(
        {"cut": content[:-9], "flipped": bytes(flipped), "empty": b"", "foreign": b"PK\n1"}[damage]
    )
    assert read(opened(tmp_path)).training["epoch"] == 1
    assert file.with_name(f"{file.name}.damaged").exists()
    assert "set aside" in caplog.text


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    class Bad(Counting):
        def state_dict(self) -> dict[str, Any]:
            return {"evil": Evil()}

    kept = opened(tmp_path)
    kept.write(Bad(), history(1), 0)  # type: ignore[arg-type]
    kept.wait()
    assert opened(tmp_path).latest() is None
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "study-1/000007/epoch-000001.ckpt.damaged").exists()


def test_one_of_another_configuration_is_ignored_and_stays(place: str) -> None:
    write(opened(place, "one"), 3)
    assert opened(place, "other").latest() is None
    assert read(opened(place, "one")).training["epoch"] == 3


def test_deleting_leaves_nothing(place: str) -> None:
    kept = opened(place)
    write(kept, 3)
    kept.delete()
    assert opened(place).latest() is None
    kept.delete()


def test_how_often_is_limited_by_epochs_and_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [epoch for epoch in range(1, 8) if opened(tmp_path, every=3).due(epoch)] == [3, 6]
    assert not any(opened(tmp_path, every=0).due(epoch) for epoch in range(1, 8))
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    slow = opened(tmp_path, at_most_s=10)
    assert not slow.due(1)
    now += 10
    assert slow.due(2)
    write(slow, 2)
    now += 9
    assert not slow.due(3)
    now += 1
    assert slow.due(3)


def test_nobody_waits_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (going_on.wait(30), fsync(number))[1])
    kept = opened(tmp_path)
    began = time.monotonic()
    kept.write(Counting(1), history(1), 0)  # type: ignore[arg-type]
    assert time.monotonic() - began < 5
    assert not kept.due(2)
    assert opened(tmp_path).latest() is None  # the half-written file has another name
    going_on.set()
    kept.wait()
    assert read(opened(tmp_path)).training["epoch"] == 1


def test_a_place_that_takes_nothing_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    kept = opened(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        write(kept, 1)
    assert "is not written" in caplog.text
    assert kept.latest() is None


def test_a_place_is_taken_as_long_as_it_may_work(place: str) -> None:
    refuse_unusable(place)
    assert "://" in place or not Path(place).exists()


def test_a_place_where_nothing_can_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is not a folder"):
        refuse_unusable(f"{tmp_path}/file/checkpoints")
    with pytest.raises(UsageError, match="Protocol not known: foo"):
        refuse_unusable("foo://bar")
    with pytest.raises(OutOfReachError, match="read-only"), monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        refuse_unusable(str(tmp_path))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtraError, match="Install s3fs") as caught:
        refuse_unusable("s3://me:geheim@bucket/x")
    assert "geheim" not in str(caught.value)


def test_a_studys_end_sweeps_its_checkpoints_and_those_long_abandoned(tmp_path: Path) -> None:
    write(opened(tmp_path), 1)
    for name, days in (("old-0123abcd", (40, 35)), ("young-0123abcd", (40, 3))):
        for epoch, old in enumerate(days):
            leave(tmp_path / name / f"000007/epoch-{epoch:06d}.ckpt", days=old)
    leave(tmp_path / "old-0123abcd/000008/epoch-000001.ckpt.damaged", days=50)
    leave(tmp_path / "old-0123abcd/000008/epoch-000002.ckpt.89abcdef.tmp", days=50)
    checkpoints.remove_study(str(tmp_path), "study-1")
    assert [folder.name for folder in tmp_path.iterdir()] == ["young-0123abcd"]


@pytest.mark.parametrize(
    "file",
    [
        "thesis/chapters/one.tex",
        "old-0123abcd/notes.txt",
        "old-0123abcd/000007/epoch-000001.ckpt.txt",
        "old-0123abcd/000007/deeper/epoch-000001.ckpt",
        "old/000007/epoch-000001.ckpt",
    ],
)
def test_what_sweeper_did_not_write_stays_where_checkpoints_are_kept(
    tmp_path: Path, file: str
) -> None:
    leave(tmp_path / file, days=400)
    leave(tmp_path / "old-0123abcd/000007/epoch-000002.ckpt", days=400)
    os.utime((tmp_path / file).parents[-len(tmp_path.parts) - 1], (0, 0))
    checkpoints.remove_study(str(tmp_path), "study-1")
    assert (tmp_path / file).exists()


def leave(file: Path, *, days: float) -> None:
    """A file that was written so many days ago."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    os.utime(file, (time.time() - days * 86400,) * 2)

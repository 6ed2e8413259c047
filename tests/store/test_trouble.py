"""SQLite in trouble: locked by another program, on a full disk, read-only. Nothing is damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper.errors import StoreRefusedError, StoreUnreachableError
from sweeper.settings import Settings
from sweeper.store import Store, database, open_store, queue, standing, studies, tickets
from sweeper.study.spec import StudySpec
from sweeper.tracking import MemoryTracker
from sweeper.worker import Worker

STUDY: dict[str, Any] = {
    "name": "trouble",
    "data": {"name": "digits", "limit": 200},
    "model": {"name": "mlp", "width": 8, "layers": 1},
    "train": {"epochs": 3, "batch_size": 50},
    "search": {"trials": 3, "sampler": "random"},
    "parameters": {"optimizer.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}},
    "faults": {"checkpoint_s": 0},
}
FILE = "\n".join(
    [
        "name: trouble",
        "data: {name: digits}",
        "model: {name: mlp}",
        "search: {trials: 3, sampler: random}",
        "parameters: {optimizer.lr: {low: 0.001, high: 0.01}}",
    ]
)


def enqueue(store: Store) -> int:
    spec = StudySpec.model_validate(STUDY)
    with store.exclusively():
        study = studies.create(store, spec)
        assert study is not None
        tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=False))
    return study.id


def sound(file: Path) -> bool:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def detach(home: Path, study: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """``sweeper launch --detach``, which writes a study and its trials and ends."""
    return subprocess.run(
        [sys.executable, "-m", "sweeper", "launch", "--detach", str(study), "--home", str(home)],
        env={name: value for name, value in os.environ.items() if not name.startswith("SWEEPER_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(FILE)
    return file


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def test_a_database_that_another_program_locks_is_out_of_reach_until_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.3)
    url = f"sqlite:///{tmp_path}/optuna.db"
    store = open_store(url)
    study_id = enqueue(store)
    program = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1]); c.isolation_level = None"
    )
    program += "; c.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "optuna.db")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        for attempt in (lambda: queue.claim(store, study_id, "me"), lambda: open_store(url)):
            with pytest.raises(StoreUnreachableError, match="database is locked") as error:
                attempt()
            assert not isinstance(error.value, StoreRefusedError)  # it is worth waiting for
            assert error.value.exit_code == 3
    finally:
        other.kill()
        other.communicate()
    claimed = queue.claim(store, study_id, "me")
    assert claimed is not None
    assert claimed.number == 0
    store.close()
    assert sound(tmp_path / "optuna.db")


def test_a_worker_on_a_full_disk_says_so_and_another_goes_on_when_there_is_room(
    small_disk: Path,
) -> None:
    settings = Settings.resolve(home=small_disk, environment={"SWEEPER_DATA": str(small_disk)})
    store = open_store(settings.store_url)
    enqueue(store)

    def worker(name: str) -> Worker:
        return Worker(
            store=store, tracker=MemoryTracker(), settings=settings, study="trouble", name=name
        )

    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    with pytest.raises(StoreRefusedError, match=r"is full|I/O") as error:
        worker("first").run()
    assert error.value.exit_code == 3
    ballast.unlink()
    store.close()
    store = open_store(settings.store_url)
    study = studies.load(store, "trouble")
    for trial in standing(store, study).rows:
        if trial.state == "running":  # what its silence would tell a minute later
            from sweeper.store import recovery

            recovery.lose_trials_of(store, study.id, "first")
            with store.exclusively():
                recovery.reconcile(store, study.id, study.spec)
    worker("second").run()
    now = standing(store, study)
    assert (now.counts["complete"], now.budget) == (3, 3)
    store.close()
    assert sound(small_disk / "optuna.db")


def test_a_launch_on_a_full_disk_ends_with_3_and_goes_on_when_there_is_room(
    small_disk: Path, study_file: Path
) -> None:
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    done = detach(small_disk / "home", study_file)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr or "is full" in done.stderr
    ballast.unlink()
    done = detach(small_disk / "home", study_file)
    assert (done.returncode, "3 trials are waiting" in done.stderr) == (0, True), done.stderr
    assert sound(small_disk / "home" / "optuna.db")


def test_a_read_only_disk_is_named(small_disk: Path, study_file: Path) -> None:
    assert detach(small_disk / "home", study_file).returncode == 0
    remount(small_disk, "ro")
    for home in ("home", "another"):
        done = detach(small_disk / home, study_file)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert "ead-only" in done.stderr or "readonly" in done.stderr
    remount(small_disk, "rw")
    assert detach(small_disk / "home", study_file).returncode == 0
    assert sound(small_disk / "home" / "optuna.db")


def test_no_file_may_grow_is_said_as_plainly(tmp_path: Path, study_file: Path) -> None:
    """The limit of a batch system instead of the disk's; it needs no mount."""
    import resource

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    began = time.monotonic()
    done = detach(tmp_path / "home", study_file, preexec_fn=limit)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "I/O error" in done.stderr or "full" in done.stderr or "too large" in done.stderr
    assert time.monotonic() - began < 100
    assert detach(tmp_path / "home", study_file).returncode == 0
    assert sound(tmp_path / "home" / "optuna.db")

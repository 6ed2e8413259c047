"""The store goes away under a worker, a worker from the store: nothing is lost or written twice."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers.postgres import Postgres

from sweeper.controller import Outage
from sweeper.errors import StoreRefusedError, StoreUnreachableError
from sweeper.settings import Settings
from sweeper.store import Standing, open_store, queue, standing, studies, tickets
from sweeper.study.spec import StudySpec
from sweeper.tracking import MemoryTracker
from sweeper.worker import Worker, reports

EPOCHS = 80
STUDY = {
    "name": "away",
    "data": {"name": "digits", "limit": 200},
    "model": {"name": "mlp", "width": 8, "layers": 1},
    "train": {"epochs": EPOCHS, "batch_size": 50},
    "search": {"trials": 1, "sampler": "random"},
    "parameters": {"optimizer.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}},
    "faults": {"heartbeat_s": 1, "lost_after_s": 4, "checkpoint_s": 0},
}


def wait_for(condition: Callable[[], Any], timeout_s: float = 90) -> Any:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.1)
    raise TimeoutError("it did not happen")


def enqueue(url: str, **sections: Any) -> None:
    store = open_store(url)
    spec = StudySpec.model_validate({**STUDY, **sections})
    with store.exclusively():
        study = studies.create(store, spec)
        if study is None:
            raise ValueError("the study is there already")
        tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=False))
    store.close()


def now(url: str) -> Standing:
    store = open_store(url)
    try:
        return standing(store, studies.load(store, "away"))
    finally:
        store.close()


class Slow(MemoryTracker):
    """Takes its time over every epoch, so that there is a while to break things in."""

    epoch = 0

    def log(self, key: str, metrics: Any, step: int, timestamp_ms: int) -> None:
        super().log(key, metrics, step, timestamp_ms)
        self.epoch = step
        time.sleep(0.1)


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("trouble", "pruner"), [("killed", "none"), ("killed", "median"), ("hanging", "median")]
)
def test_training_goes_on_while_the_server_is_away(
    postgres: Postgres, tmp_path: Path, trouble: str, pruner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "_WAIT_S", 1.0)
    enqueue(postgres.url, search={**STUDY["search"], "pruner": {"name": pruner}})
    tracker = Slow()
    worker = Worker(
        store=open_store(postgres.url),
        tracker=tracker,
        settings=Settings.resolve(home=tmp_path, environment={"SWEEPER_DATA": str(tmp_path)}),
        study="away",
        name="me",
    )
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    wait_for(lambda: tracker.epoch >= 3)
    (postgres.kill if trouble == "killed" else postgres.stop)()
    before = tracker.epoch
    wait_for(lambda: tracker.epoch >= before + 20)
    time.sleep(3)  # longer than a heartbeat, and than the last epochs
    (postgres.start if trouble == "killed" else postgres.go_on)()
    thread.join(120)
    assert not thread.is_alive()
    row = now(postgres.url).rows[0]
    assert (row.state, row.attempt, len(now(postgres.url).rows)) == ("complete", 1, 1)
    values = {step: value for step, (value, _) in tracker.runs["away/0"].metrics[METRIC].items()}
    assert sorted(row.history) == list(range(1, EPOCHS + 1))
    assert row.history == pytest.approx(values)


METRIC = "val_accuracy"


def test_training_waits_for_no_report_where_nothing_is_decided(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    enqueue(url)
    store = open_store(url)
    study = studies.load(store, "away")
    claimed = queue.claim(store, study.id, "me")
    assert claimed is not None
    said = reports.Reports(reports.Reporter(store), study, claimed)
    with contextlib.closing(sqlite3.connect(tmp_path / "optuna.db")) as other:
        other.execute("BEGIN IMMEDIATE")  # nobody else can write now
        for epoch in range(1, 4):
            assert not said.tell(epoch, epoch / 10)
        assert not said.settle(0.5)
        other.rollback()
    assert said.settle(60)
    said.close()
    assert dict(now(url).rows[0].history) == {1: 0.1, 2: 0.2, 3: 0.3}
    store.close()


def test_a_worker_that_was_given_up_finds_out_and_writes_nothing(tmp_path: Path) -> None:
    database = tmp_path / "optuna.db"
    url = f"sqlite:///{database}"
    enqueue(url, train={"epochs": 150, "batch_size": 2})
    environment = {
        **os.environ,
        "SWEEPER_HOME": str(tmp_path),
        "SWEEPER_STORE": url,
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",  # nobody answers
        "OMP_NUM_THREADS": "1",
    }

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sweeper", "worker", "away"],
            env={**environment, "SWEEPER_WORKER": name},
            stderr=subprocess.PIPE,
            text=True,
        )

    def unlocked() -> bool:
        with contextlib.closing(sqlite3.connect(database, timeout=1)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            connection.rollback()
            return True

    zombie = start("zombie")
    wait_for(lambda: (now(url).rows[0].epoch or 0) >= 3)
    zombie.send_signal(signal.SIGSTOP)
    while not unlocked():  # stopped in the middle of a transaction: not now
        zombie.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        zombie.send_signal(signal.SIGSTOP)
    heir = start("heir")
    try:
        wait_for(lambda: len(now(url).rows) == 2 and now(url).rows[1].epoch)
        left = dict(now(url).rows[0].history)
        zombie.send_signal(signal.SIGCONT)
        _, said = zombie.communicate(timeout=120)
        _, heard = heir.communicate(timeout=120)
    finally:
        for process in (zombie, heir):
            process.kill()
    assert "was given to another worker; dropped" in said
    assert "goes on after epoch" in heard
    first, second = now(url).rows
    assert (first.state, first.outcome, first.worker) == ("retried", "lost", "zombie")
    assert first.history == left
    assert (second.state, second.worker, second.origin) == ("complete", "heir", 0)
    assert sorted(second.history) == list(range(1, 151))
    assert (zombie.returncode, heir.returncode) == (0, 0)


def test_a_full_disk_is_said_to_be_full_and_damages_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    enqueue(url)
    with contextlib.closing(sqlite3.connect(tmp_path / "optuna.db")) as connection:
        size = connection.execute("PRAGMA page_count").fetchone()[0]
    store = open_store(url)
    study = studies.load(store, "away")
    with store.backend.engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count={size}")  # a disk that is full
    with pytest.raises(StoreRefusedError, match="is full") as caught:
        for _ in range(2000):
            tickets.fill(store, study.id, study.spec, [tickets.Ticket(key="more", values={})] * 50)
    assert caught.value.exit_code == 3
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "optuna.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_controller_bears_an_outage_but_not_a_full_disk() -> None:
    outage = Outage()
    assert "trials go on" in outage.goes_on(StoreUnreachableError("refused"))
    outage.ended()
    with pytest.raises(StoreRefusedError):
        outage.goes_on(StoreRefusedError("full"))

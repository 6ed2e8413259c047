"""A cluster in small: PostgreSQL, two controllers, workers without a study, a detached launch."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy
from cli.conftest import Sweeper
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.mlflow, pytest.mark.postgres]


class Cluster:
    """The processes of one store, each with a log of its own."""

    def __init__(self, folder: Path, store_url: str) -> None:
        self.sweeper = Sweeper(folder)
        self._store_url = store_url
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.sweeper.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sweeper", *words],
                cwd=self.sweeper.folder,
                env={
                    **self.sweeper.environment,
                    "SWEEPER_STORE": self._store_url,
                    "OMP_NUM_THREADS": "1",
                    **environment,
                },
                stderr=log,
                stdout=log,
            )
        self._processes.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.sweeper.folder / f"{name}.log").read_text(errors="replace")

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 200) -> Any:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if found := condition():
                return found
            time.sleep(0.3)
        logs = {file.name: file.read_text() for file in self.sweeper.folder.glob("*.log")}
        raise TimeoutError(f"it did not happen: {logs}")

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path, postgres_database: Callable[[], str]) -> Iterator[Cluster]:
    folder = tmp_path / "my cluster"
    folder.mkdir()
    running = Cluster(folder, postgres_database())
    yield running
    running.close()


def metrics(address: str) -> dict[tuple[str | None, ...], float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, *map(sample.labels.get, sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.timeout(600)  # seven processes; machines for tests are slow
def test_a_detached_study_is_trained_and_finished_once(cluster: Cluster) -> None:
    pytest.importorskip("grpc", reason="the extra grpc is not installed")
    os.environ.setdefault("no_proxy", "127.0.0.1")
    places = ("--port", "0", "--grpc", "127.0.0.1:0")
    first = cluster.start("first", "controller", *places)
    proxy = cluster.wait_for(lambda: re.search(r"grpc://\S+", cluster.log("first")))[0]
    address = re.search(r"http://[^/]+", cluster.log("first"))[0]  # type: ignore[index]  # it began with that
    near = cluster.start("near", "worker", SWEEPER_LAUNCHER="local")
    far = cluster.start("far", "worker", SWEEPER_STORE=proxy, SWEEPER_LAUNCHER="slurm")
    second = cluster.start("second", "controller", "--port", "0")
    file = cluster.sweeper.write(search={"trials": 6, "sampler": "random"})
    assert cluster.start("launch", "launch", "--detach", str(file)).wait(120) == 0
    cluster.wait_for(lambda: "is finished" in cluster.log("first") + cluster.log("second"))

    now = cluster.wait_for(
        lambda: (found := metrics(address))["sweeper_trials", "complete", "small"] == 6 and found
    )
    assert now["sweeper_budget_trials", "small"] == 6
    assert now[("sweeper_queue_length",)] == 0
    assert now["sweeper_workers", "local"] == now["sweeper_workers", "slurm"] == 1
    logs = cluster.log("first") + cluster.log("second")
    assert logs.count("is finished") == 1, logs
    assert (cluster.sweeper.folder / ".sweeper/reports/small/index.html").exists()
    trained = {name: cluster.log(name).count("completed after") for name in ("near", "far")}
    assert sum(trained.values()) == 6, trained
    for process in (near, far):
        assert "postgresql" not in " ".join(psutil.Process(process.pid).cmdline())

    for process, number, code in (
        (near, signal.SIGTERM, 143),
        (far, signal.SIGTERM, 143),
        (second, signal.SIGINT, 130),
        (first, signal.SIGTERM, 0),
    ):
        process.send_signal(number)
        assert process.wait(60) == code
    assert cluster.start("workers", "workers", "--json").wait(60) == 0
    assert cluster.log("workers").strip() == "[]"  # who ends in good order is gone at once
    assert cluster.start("doctor", "doctor", "--study", "small").wait(120) == 0
    assert "agree on all 6 trials" in cluster.log("doctor")


def test_a_controller_waits_for_its_store(
    tmp_path: Path, postgres_database: Callable[[], str]
) -> None:
    missing = sqlalchemy.make_url(postgres_database()).set(database="not_there_yet")
    cluster = Cluster(tmp_path, missing.render_as_string(hide_password=False))
    try:
        process = cluster.start("controller", "controller", "--port", "0")
        cluster.wait_for(lambda: "waiting for the store" in cluster.log("controller"))
        address = re.search(r"http://[^/]+", cluster.log("controller"))[0]  # type: ignore[index]  # as above
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{address}/healthz", timeout=10)
        with urllib.request.urlopen(f"{address}/livez", timeout=10) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        cluster.close()

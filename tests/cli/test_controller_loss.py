"""``sweeper launch`` itself is lost, doubled, or kept waiting: no trial is lost or run twice."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

import psutil
import pytest
from cli.conftest import Sweeper, workers_of
from cli.test_launch import running, wait_for
from servers.postgres import Postgres

TRIALS = 3
SLOW = {
    "train": {"epochs": 180, "batch_size": 4},
    "search": {"trials": TRIALS, "sampler": "random"},
}


def accounts(sweeper: Sweeper) -> list[dict[str, Any]]:
    """The trials, after everything that must hold of a whole study was seen to hold."""
    rows: list[dict[str, Any]] = sweeper.json("trials", "small")
    current = [row for row in rows if row["state"] != "retried"]
    assert [row["state"] for row in current] == ["complete"] * TRIALS
    assert len({row["run_id"] for row in current}) == TRIALS
    assert f"agree on all {TRIALS} trials" in sweeper.run("doctor", "--study", "small")
    reports = sorted((sweeper.folder / ".sweeper/reports").glob("*/index.html"))
    assert [page.parent.name for page in reports] == ["small"]
    assert own_runs(sweeper) == 1
    return rows


def own_runs(sweeper: Sweeper) -> int:
    """How many runs the study as such has in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{sweeper.folder}/.sweeper/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    return len(
        client.search_runs(
            [experiment.experiment_id], filter_string="tags.`sweeper.role` = 'study'"
        )
    )


@pytest.mark.mlflow
def test_a_launch_that_was_killed_is_started_again_while_its_workers_still_end(
    sweeper: Sweeper,
) -> None:
    file = sweeper.write(**SLOW)
    first = sweeper.start("launch", file, "--workers", "2", start_new_session=True)
    wait_for(lambda: running(sweeper, epoch=3))
    orphans = workers_of(psutil.Process(first.pid))
    first.kill()
    first.communicate()
    result = sweeper.json("launch", file, "--workers", "2")  # at once: the workers live on a while
    assert result["trials"]["complete"] == TRIALS
    psutil.wait_procs(orphans, timeout=30)
    rows = accounts(sweeper)
    assert len(rows) <= TRIALS + 2  # at most the two that ran were taken for lost
    logs = (sweeper.folder / ".sweeper/logs/small").glob("*.log")
    assert any("goes on after epoch" in log.read_text() for log in logs)


@pytest.mark.mlflow
def test_two_launches_of_one_study_share_it(sweeper: Sweeper) -> None:
    file = sweeper.write(**SLOW)
    both = [sweeper.start("launch", file, "--workers", "1", "--json") for _ in range(2)]
    said = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("Traceback" not in err for _, err in said), said
    rows = accounts(sweeper)
    assert len(rows) == TRIALS  # nothing was taken for lost
    assert len({row["worker"] for row in rows}) == 2


def ends_within(process: subprocess.Popen[str], seconds: float) -> float:
    began = time.monotonic()
    process.wait(seconds)
    return time.monotonic() - began


@pytest.mark.postgres
@pytest.mark.mlflow
def test_ctrl_c_is_heard_while_the_database_hangs(sweeper: Sweeper, postgres: Postgres) -> None:
    """PostgreSQL takes connections and answers nothing, as after SIGSTOP."""
    file = sweeper.write(train={"epochs": 400, "batch_size": 4})
    launch = sweeper.start("launch", file, "--workers", "1", "--store", postgres.url)
    wait_for(lambda: workers_of(psutil.Process(launch.pid)))
    wait_for(lambda: "running" in sweeper.run("status", "--store", postgres.url))
    (worker,) = workers_of(psutil.Process(launch.pid))
    postgres.stop()
    try:
        time.sleep(2)  # until a look at the store hangs
        for _ in range(2):
            launch.send_signal(signal.SIGINT)
            time.sleep(1)
        took_s = ends_within(launch, 60)
    finally:
        postgres.go_on()
    _, err = launch.communicate(timeout=60)
    assert launch.returncode == 130, err
    assert "the store must answer" in err and "launch small again" in err
    assert took_s < 10  # a last word that the store does not take, and the end of MLflow
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE

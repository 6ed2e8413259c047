"""What a real launch leaves behind: nobody else can read it, and no password is in it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy
from cli.conftest import Sweeper

SECRET = "s3cr3tPa55word"

pytestmark = pytest.mark.mlflow


def test_everything_in_the_home_folder_is_its_owners_only(
    launched: tuple[Sweeper, dict[str, Any]],
) -> None:
    """The command ran with a umask that takes nothing away."""
    sweeper, _ = launched
    home = sweeper.folder / ".sweeper"
    assert {"optuna.db", "mlflow.db", "logs", "reports", "artifacts", "server.json"} <= {
        path.name for path in home.iterdir()
    }
    top = [home, *home.iterdir(), *(home / "logs").rglob("*"), *(home / "spool").rglob("*")]
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in top if _is_open(path)} == {}


def _is_open(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o077)


def _argv_and_files(launch: subprocess.Popen[str]) -> set[str]:
    """The command lines of a launch and its children while it runs: what ``ps`` shows to all."""
    seen: set[str] = set()
    while launch.poll() is None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(launch.pid).children(recursive=True):
                seen.add(" ".join(process.cmdline()))
        with contextlib.suppress(subprocess.TimeoutExpired):
            launch.wait(0.3)
    return seen


@pytest.mark.postgres
def test_passwords_of_store_and_tracker_are_nowhere(
    sweeper: Sweeper, postgres_database: Callable[[], str], mlflow_server: str
) -> None:
    from mlflow import MlflowClient

    store = sqlalchemy.make_url(postgres_database()).set(password=SECRET)
    tracker = mlflow_server.replace("http://", f"http://me:{SECRET}@")
    environment = {
        **sweeper.environment,
        "SWEEPER_STORE": store.render_as_string(hide_password=False),
        "MLFLOW_TRACKING_URI": tracker,
    }

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sweeper", *words],
            cwd=sweeper.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    name = f"secret-{os.getpid()}"
    file = sweeper.write(name=name, search={"trials": 1, "sampler": "random"})
    launch = start("launch", str(file), "--workers", "1", "--json")
    argv = _argv_and_files(launch)
    said = "".join(launch.communicate())
    assert launch.returncode == 0, said
    assert any(" worker " in line for line in argv)
    for words in (["status"], ["trials", name], ["doctor"], ["doctor", "--study", name]):
        said += "".join(start(*words).communicate(timeout=120))
    assert SECRET not in said
    assert SECRET not in "\n".join(argv)
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    assert SECRET not in str([run.to_dictionary() for run in runs])
    for run in runs:
        folder = sweeper.folder / run.info.run_id
        folder.mkdir()
        client.download_artifacts(run.info.run_id, "", str(folder))
    files = [path for path in sweeper.folder.rglob("*") if path.is_file()]
    assert any(path.name == "index.html" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    address = store.set(drivername="postgresql+psycopg")
    with sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool).connect() as stored:
        for table in ("study_user_attributes", "trial_user_attributes"):
            rows = stored.execute(sqlalchemy.text(f"SELECT value_json FROM {table}")).scalars()
            assert SECRET not in "".join(rows)

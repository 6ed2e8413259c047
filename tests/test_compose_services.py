"""All services of docker-compose.yml, run as processes with its commands and its environment.

Without Docker, on this machine: PostgreSQL from a wheel, MLflow, the controller and a container's
worth of workers, each started when those before it are healthy. A study is launched from outside.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from compose.file import EXAMPLE, ROOT, Machine, env_file
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("pgserver", reason="the wheel pgserver is not installed")
pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")

from compose.processes import POSTGRES, Running

from sweeper.launchers import forks

pytestmark = [pytest.mark.postgres, pytest.mark.mlflow, pytest.mark.timeout(600)]

TRIALS = 6
STUDY = {
    "name": "outside",
    "data": {"name": "digits", "limit": 300},
    "model": {"name": "mlp", "width": 16, "layers": 1},
    "train": {"epochs": 3, "batch_size": 50},
    "search": {"trials": TRIALS, "sampler": "random", "pruner": {"name": "none"}},
    "parameters": {"optimizer.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}},
    "faults": {"heartbeat_s": 1, "lost_after_s": 5},
}


class Outside:
    """Somebody on the same machine, who knows the ``.env``."""

    def __init__(self, running: Running, secrets_: Mapping[str, str], folder: Path) -> None:
        self.running = running
        self.secrets = secrets_
        self.folder = folder
        self.ports = running.machine.ports
        self.heard = ""

    def get(
        self, port: int, path: str, login: str | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and body of what a service answers."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[port]}{path}", headers=headers
        )
        if login is not None:
            word = base64.b64encode(login.encode()).decode()
            request.add_header("Authorization", f"Basic {word}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def mlflow(self, path: str) -> Any:
        """What MLflow answers to the login of the ``.env``."""
        status, body = self.get(5000, path, f"sweeper:{self.secrets['MLFLOW_PASSWORD']}")
        assert status == 200, body
        return json.loads(body)

    def sweeper(self, *words: str, code: int = 0, **more: str) -> str:
        """Standard output of a command with nothing but the store's address and its password."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SWEEPER_", "MLFLOW_", "PG"))
        }
        done = subprocess.run(
            [sys.executable, "-m", "sweeper", *words],
            cwd=self.folder,
            env={
                **kept,
                "PYTHONPATH": str(ROOT),
                "SWEEPER_STORE": f"postgresql://sweeper@127.0.0.1:{self.ports[5432]}/sweeper",
                "PGPASSWORD": self.secrets["SWEEPER_DB_PASSWORD"],
                **more,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        self.heard += done.stdout + done.stderr
        assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}{self.running.logs()}"
        return done.stdout

    def metrics(self) -> dict[str, float]:
        """The controller's metrics: name with labels to value."""
        status, body = self.get(8321, "/metrics")
        assert status == 200
        self.heard += body
        return {
            sample.name
            + "".join(
                f" {key}={value}" for key, value in sorted(sample.labels.items())
            ): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }

    def sql(
        self, role: str, database: str, password: str, query: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(str(POSTGRES / "psql"), "--no-psqlrc", "--tuples-only", "--no-align"),
                *("--host=127.0.0.1", f"--port={self.ports[5432]}", f"--username={role}"),
                *("--no-password", f"--dbname={database}", f"--command={query}"),
            ],
            env={"PGPASSWORD": password, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


def until(condition: Callable[[], Any], what: str, running: Running, timeout_s: float = 180) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen:\n{running.logs()}")
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    """The services, all up: started in the order that the file demands."""
    # Not in pytest's folder, which nobody but root may enter: PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="sweeper-compose-"))
    folder.chmod(0o755)
    example = env_file(EXAMPLE.read_text("utf-8"))
    filled = {name: f"it's %40 {secrets.token_hex(12)}" for name in example}
    machine = Machine(folder / "machine", {**filled, "WORKERS": "2"})
    (folder / "elsewhere").mkdir()
    running = Running(machine)
    try:
        for name in ("worker-cpu", "controller"):
            running.start(name)
            running.wait_until_healthy(name)
        assert list(running.processes) == ["postgres", "mlflow", "worker-cpu", "controller"]
        yield Outside(running, filled, folder / "elsewhere")
    finally:
        running.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_mlflow_asks_for_a_password(outside: Outside) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    login = f"sweeper:{outside.secrets['MLFLOW_PASSWORD']}"
    assert outside.get(5000, path)[0] == 401
    assert outside.get(5000, path, "sweeper:not the password")[0] == 401
    assert outside.get(5000, path, "admin:password1234")[0] == 401
    assert outside.get(5000, path, login)[0] == 200
    assert outside.get(5000, "/")[0] == 401
    assert outside.get(5000, "/ajax-api/3.0/mlflow/assistant/config")[0] == 401
    assert outside.get(5000, "/api/2.0/mlflow-artifacts/artifacts")[0] == 401
    assert outside.get(5000, "/health")[0] == 200


def test_a_wrong_password_is_not_told(outside: Outside) -> None:
    wrong = "an outworn password"
    said = outside.sweeper(
        *("doctor", "--json"),
        code=2,
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{outside.ports[5000]}",
        MLFLOW_TRACKING_USERNAME="sweeper",
        MLFLOW_TRACKING_PASSWORD=wrong,
    )
    (finding,) = (each for each in json.loads(said) if each["subject"] == "mlflow")
    assert finding["verdict"] == "bad"
    assert "401" in finding["found"] or "not authenticated" in finding["found"].lower()
    assert wrong not in outside.heard


def test_mlflow_answers_to_its_own_names_only(outside: Outside) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    login = f"sweeper:{outside.secrets['MLFLOW_PASSWORD']}"
    own = f"localhost:{outside.ports[5000]}"
    assert outside.get(5000, path, login, Host=own)[0] == 200
    assert outside.get(5000, path, login, Host="evil.example")[0] == 403


def test_each_role_has_one_database_and_needs_its_password(outside: Outside) -> None:
    sweeper, mlflow = (outside.secrets[f"{name}_DB_PASSWORD"] for name in ("SWEEPER", "MLFLOW"))
    assert outside.sql("sweeper", "sweeper", sweeper, "SELECT 1").stdout.strip() == "1"
    assert outside.sql("mlflow", "mlflow", mlflow, "SELECT 1").stdout.strip() == "1"
    assert "password authentication failed" in outside.sql("sweeper", "sweeper", mlflow, "").stderr
    for role, database, password in (
        ("sweeper", "mlflow", sweeper),
        ("mlflow", "sweeper", mlflow),
    ):
        refused = outside.sql(role, database, password, "SELECT 1").stderr
        assert f'permission denied for database "{database}"' in refused
    powers = "SELECT rolsuper OR rolcreaterole OR rolcreatedb FROM pg_roles WHERE rolname = user"
    assert outside.sql("sweeper", "sweeper", sweeper, powers).stdout.strip() == "f"
    assert outside.sql("mlflow", "mlflow", mlflow, powers).stdout.strip() == "f"


def test_a_study_from_outside_is_trained_counted_and_tracked(outside: Outside) -> None:
    """`launch --detach` from outside, a worker killed in between, exact accounts everywhere."""
    running = outside.running
    assert outside.get(8321, "/healthz")[0] == 200
    until(
        lambda: outside.metrics().get("sweeper_workers launcher=compose") == 2, "workers", running
    )
    file = outside.folder / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    outside.sweeper("launch", "--detach", str(file))
    workers = _workers(running)
    assert len(workers) == 2
    until(lambda: _trials(outside).get("running"), "a trial", running)
    workers[0].send_signal(signal.SIGKILL)
    until(lambda: _trials(outside).get("complete") == TRIALS, "the end of the study", running)
    running.see_command_lines()
    now = _workers(running)
    assert len(now) == 2
    assert workers[0].pid not in {found.pid for found in now}

    (status,) = json.loads(outside.sweeper("status", "--json"))
    metrics = outside.metrics()
    assert _trials(outside) == status["trials"]
    assert status["trials"]["complete"] == TRIALS
    assert sum(status["trials"].values()) == TRIALS + status["trials"]["retried"]
    assert metrics["sweeper_budget_trials study=outside"] == TRIALS
    assert metrics["sweeper_queue_length"] == 0
    assert metrics["sweeper_store_up"] == 1

    until(lambda: _tracked(outside) == TRIALS, "the runs in MLflow", running)
    until(lambda: outside.metrics()["sweeper_spool_bytes"] == 0, "an empty spool", running)
    home = Path(running.machine.places["/var/lib/sweeper/home"])
    until((home / "reports/outside/index.html").exists, "the report", running)
    listed = json.loads(outside.sweeper("workers", "--json"))
    assert {row["launcher"] for row in listed} == {"compose"}


def test_the_backup_that_the_page_shows_has_both_databases(outside: Outside) -> None:
    (line,) = re.findall(r"^.*pg_dumpall.*$", (ROOT / "docs/cluster.md").read_text("utf-8"), re.M)
    words = shlex.split(line)
    assert words[:5] == ["docker", "compose", "exec", "-T", "postgres"]
    assert words[-2:] == [">", "sweeper-backup.sql"]
    dumped = outside.running.exec_in_postgres(words[5:-2])
    outside.heard += dumped
    for name in ("sweeper", "mlflow"):
        assert f"CREATE ROLE {name};" in dumped
        assert f"\\connect {name}\n" in dumped
    assert "PostgreSQL database cluster dump complete" in dumped


def _workers(running: Running) -> list[psutil.Process]:
    tied = [found for found in running.family("worker-cpu") if "--tied" in found.cmdline()]
    if not forks.POSSIBLE:
        return tied
    return [found for found in tied if found.ppid() in {each.pid for each in tied}]


def _trials(outside: Outside) -> dict[str, float]:
    """Trials by state, as the controller's metrics count them."""
    prefix = "sweeper_trials state="
    return {
        name.removeprefix(prefix).removesuffix(" study=outside"): value
        for name, value in outside.metrics().items()
        if name.startswith(prefix)
    }


def _tracked(outside: Outside) -> int:
    found = outside.mlflow("/api/2.0/mlflow/experiments/get-by-name?experiment_name=outside")
    experiment = found["experiment"]["experiment_id"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{outside.ports[5000]}/api/2.0/mlflow/runs/search",
        data=json.dumps(
            {"experiment_ids": [experiment], "filter": "tags.`sweeper.role` = 'trial'"}
        ).encode(),
        headers={"Content-Type": "application/json"},
    )
    word = base64.b64encode(f"sweeper:{outside.secrets['MLFLOW_PASSWORD']}".encode()).decode()
    request.add_header("Authorization", f"Basic {word}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        runs = json.loads(answer.read()).get("runs", [])
    return sum(run["info"]["status"] == "FINISHED" for run in runs)


def test_no_secret_shows_anywhere(outside: Outside) -> None:
    """Not in logs, folders, databases, answers, nor on any command line."""
    running = outside.running
    words = [re.escape(secret.rsplit(" ", 1)[1]) for secret in outside.secrets.values()]
    found = re.compile("|".join(words).encode())
    looked = 0
    for file in running.machine.folder.rglob("*"):
        if file.is_file() and "volumes/postgres" not in str(file):
            looked += 1
            assert not found.search(file.read_bytes()), file
    assert looked >= 4
    assert not found.search(outside.heard.encode())
    assert not found.search("\n".join(running.command_lines).encode())
    for database in ("sweeper", "mlflow"):
        dumped = subprocess.run(
            [
                *(str(POSTGRES / "pg_dump"), "--host=127.0.0.1", f"--port={outside.ports[5432]}"),
                *(f"--username={database}", "--no-password", database),
            ],
            env={
                "PGPASSWORD": outside.secrets[f"{database.upper()}_DB_PASSWORD"],
                "PATH": os.environ["PATH"],
            },
            capture_output=True,
            timeout=60,
            check=True,
        )
        assert b"alembic_version" in dumped.stdout
        assert not found.search(dumped.stdout), database


def test_nothing_is_written_outside_the_volumes(outside: Outside) -> None:
    """But into the home folder, so the pods of Kubernetes may have a read-only root."""
    names = {file.name for file in outside.running.machine.folder.iterdir()}
    services = {"postgres.log", "mlflow.log", "worker-cpu.log", "controller.log"}
    assert names - {"home"} == services | {"volumes"}


def test_services_end_within_their_grace_period(outside: Outside) -> None:
    running = outside.running
    families = {name: running.family(name) for name in running.processes}
    for name in ("worker-cpu", "controller", "mlflow", "postgres"):
        code, _ = running.stop(name)
        assert code == (143 if name == "worker-cpu" else 0), (
            f"{name} ended with {code}:\n{running.logs()}"
        )
        for child in families[name]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.wait(10)

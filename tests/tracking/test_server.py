"""The embedded server: one a home folder, at one address, and never an orphan."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sweeper.cli.checks import _mlflow
from sweeper.errors import TrackerUnreachableError
from sweeper.settings import Settings, sqlite_url
from sweeper.tracking import LocalServer, RunStart, SpoolTracker, running_address
from sweeper.tracking import mlflow as server
from sweeper.tracking.database import is_current
from sweeper.tracking.service import readable_uri

pytestmark = pytest.mark.mlflow


@pytest.fixture
def settings(nasty_folder: Path) -> Settings:
    return Settings.resolve(home=nasty_folder / "home", environment={})


@pytest.fixture
def local(settings: Settings) -> Iterator[LocalServer]:
    with LocalServer(settings) as running:
        yield running


def pid_of(settings: Settings) -> int:
    import json

    return int(json.loads(settings.server_file.read_text())["pid"])


def gone(pid: int, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return bytes(answer.read())


def test_a_run_written_over_http_is_read_from_the_folder_when_the_server_is_gone(
    local: LocalServer, settings: Settings, begin: Callable[..., RunStart], tmp_path: Path
) -> None:
    address = local.ensure()
    picture = tmp_path / "it's a 100% figure.svg"
    picture.write_text("<svg/>")
    start = begin(params={"lr": 0.1})
    with SpoolTracker(settings.spool, lambda: running_address(settings)) as tracker:
        tracker.start(start)
        tracker.log(start.key, {"val_loss": 0.5}, 1, start.start_time_ms)
        tracker.artifact(start.key, picture, "figures")
        tracker.end(start.key, status="FINISHED", end_time_ms=start.start_time_ms)
        assert tracker.flush(30) == 0

    client = server.connect(address)
    run_id = server.run_ids(client, start.experiment)[start.key]
    # what the pages of the browser ask the server for
    assert b"<html" in get(address)
    listed = get(f"{address}/ajax-api/2.0/mlflow/artifacts/list?run_id={run_id}&path=figures")
    assert b"100% figure.svg" in listed
    shown = get(
        f"{address}/get-artifact?run_uuid={run_id}&path=figures/it%27s%20a%20100%25%20figure.svg"
    )
    assert shown == b"<svg/>"

    # MLflow's assistant runs shell commands for whoever reaches the port; not here
    for path in ("assistant/config", "assistant/providers"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{address}/ajax-api/3.0/mlflow/{path}")

    local.stop()
    assert running_address(settings) is None
    direct = server.connect(settings.embedded_tracking_uri)
    assert server.run_ids(direct, start.experiment) == {start.key: run_id}
    run = server.get_run(direct, run_id)
    assert run.data.metrics == {"val_loss": 0.5}
    [file] = direct.list_artifacts(run_id, "figures")
    copy = server.download_artifact(direct, run_id, file.path, tmp_path / "copy")
    assert copy.read_text() == "<svg/>"


def test_a_killed_server_comes_back_where_it_was_and_everything_arrives(
    local: LocalServer, settings: Settings, begin: Callable[..., RunStart], tmp_path: Path
) -> None:
    address = local.ensure()
    start = begin()
    with SpoolTracker(tmp_path / "spool", address, gather_s=0.01) as tracker:
        tracker.start(start)
        for epoch in range(1, 61):
            tracker.log(start.key, {"a": float(epoch)}, epoch, start.start_time_ms + epoch)
            time.sleep(0.002)
            if epoch == 30:
                os.kill(pid_of(settings), signal.SIGKILL)
        tracker.end(start.key, status="FINISHED", end_time_ms=start.start_time_ms + 100)
        assert tracker.flush(0.2) > 0
        assert local.ensure() == address
        assert tracker.flush(30) == 0
    client = server.connect(address)
    [run] = client.search_runs([server.experiment_id(client, start.experiment)])
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "a")
    assert sorted(point.step for point in points) == list(range(1, 61))


def test_a_second_process_uses_the_server_that_is_there(
    local: LocalServer, settings: Settings
) -> None:
    address = local.ensure()
    pid = pid_of(settings)
    program = (
        "import sys; from sweeper.settings import Settings; from sweeper.tracking import *\n"
        "with LocalServer(Settings.resolve(home=sys.argv[1])) as s: print(s.ensure())"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(settings.home)], capture_output=True, text=True
    )
    assert (other.stdout.strip(), other.stderr) == (address, "")
    assert pid_of(settings) == pid
    assert local.ensure() == address  # the other one's end did not end it
    assert running_address(settings) == address


PARENT = """
import sys, time
from sweeper.settings import Settings
from sweeper.tracking import LocalServer
print(LocalServer(Settings.resolve(home=sys.argv[1])).ensure(), flush=True)
time.sleep(60)
"""


def test_the_server_ends_with_a_parent_that_is_killed(settings: Settings) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(settings.home)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        address = parent.stdout.readline().strip()
    assert address == running_address(settings)
    pid = pid_of(settings)
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    parent.kill()
    parent.wait()
    assert all(gone(member, within_s=8) for member in family)
    assert running_address(settings) is None


def test_a_parent_killed_while_the_server_starts_leaves_nothing(settings: Settings) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(settings.home)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    until = time.monotonic() + 20
    children: list[psutil.Process] = []
    while not children and time.monotonic() < until:
        children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert children
    assert all(gone(child.pid, within_s=8) for child in children)


def test_stopping_ends_the_process_at_once_and_may_be_repeated(settings: Settings) -> None:
    local = LocalServer(settings)
    local.ensure()
    pid = pid_of(settings)
    began = time.monotonic()
    local.stop()
    local.stop()
    assert time.monotonic() - began < 4
    assert not psutil.pid_exists(pid)


def test_a_server_that_hangs_is_replaced(
    local: LocalServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeper.tracking.server._HEALTH_TIMEOUT_S", 0.3)
    address = local.ensure()
    hanging = pid_of(settings)
    os.kill(hanging, signal.SIGSTOP)
    monkeypatch.setattr("sweeper.tracking.server._STOP_S", 0.5)
    assert local.ensure() == address  # one slow answer proves nothing
    assert pid_of(settings) == hanging
    local.ensure()
    assert local.ensure() == address
    assert pid_of(settings) != hanging
    assert not psutil.pid_exists(hanging)
    assert get(f"{address}/health") == b"OK"


def test_a_server_that_cannot_start_says_why(settings: Settings) -> None:
    settings.home.mkdir(parents=True)
    (settings.home / "mlflow.db").write_bytes(b"this is no database, whatever its name says" * 99)
    with pytest.raises(TrackerUnreachableError, match=r"ended with code 1(.|\n)*not a database"):
        LocalServer(settings).ensure()
    assert running_address(settings) is None


def test_what_another_process_left_in_the_file_is_not_believed(settings: Settings) -> None:
    settings.home.mkdir(parents=True)
    for content in ("", "{", "[]", '{"pid": 1}', '{"pid": 1, "port": 80, "started": 0}'):
        settings.server_file.write_text(content)
        assert running_address(settings) is None


def test_a_server_that_was_killed_while_it_created_its_database_leaves_nothing_in_the_way(
    settings: Settings,
) -> None:
    """MLflow creates 65 tables in 2 s, and refuses a database that has only some of them."""
    new = settings.home / "mlflow.db.new"

    first, others = LocalServer(settings), set(psutil.Process().children())

    def start() -> None:
        with contextlib.suppress(TrackerUnreachableError):
            first.ensure()

    starting = threading.Thread(target=start)
    starting.start()
    try:
        until = time.monotonic() + 60
        while not (serving := set(psutil.Process().children()) - others):
            assert time.monotonic() < until, "no server was started"
        while not (new.exists() and new.stat().st_size > 50_000):
            assert time.monotonic() < until, "no database was begun"
            time.sleep(0.002)
        serving.pop().kill()
        assert not (settings.home / "mlflow.db").exists()
    finally:
        starting.join()
        first.stop()
    with LocalServer(settings) as second:
        assert get(f"{second.ensure()}/health") == b"OK"
    assert not list(settings.home.glob("mlflow.db.new*"))


def written_by_an_older_mlflow(database: Path) -> str:
    """Create a database of the schema before the last; which one that is."""
    import sqlalchemy
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base

    database.parent.mkdir()
    engine = sqlalchemy.create_engine(sqlite_url(database))
    Base.metadata.create_all(engine)
    config = utils._get_alembic_config(sqlite_url(database))
    scripts = ScriptDirectory.from_config(config)
    before = scripts.get_revision(scripts.get_heads()[0]).down_revision
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, before)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) "
            "VALUES (7, 'kept', 'file:///none', 'active')"
        )
    engine.dispose()
    return str(before)


@pytest.mark.parametrize("through", ["server", "file"])
def test_a_database_of_an_older_mlflow_is_brought_up_to_date(
    settings: Settings, through: str
) -> None:
    database = settings.home / "mlflow.db"
    found = written_by_an_older_mlflow(database)
    assert not is_current(settings.embedded_tracking_uri)
    [said] = [item for item in _mlflow(settings) if "older" in item.found]
    assert (said.verdict, str(database) in said.found) == ("note", True)
    if through == "server":
        with LocalServer(settings) as local:
            assert server.experiment_id(server.connect(local.ensure()), "kept") == "7"
    else:
        uri = readable_uri(settings)
        assert uri is not None
        assert server.experiment_id(server.connect(uri), "kept") == "7"
    assert is_current(settings.embedded_tracking_uri)
    kept = database.with_name(f"mlflow.db.{found}")
    assert not is_current(sqlite_url(kept))
    assert kept.stat().st_mode & 0o077 == 0


def test_a_database_of_a_newer_mlflow_is_left_alone(settings: Settings) -> None:
    database = settings.home / "mlflow.db"
    written_by_an_older_mlflow(database)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'deadbeef'")
        connection.commit()
    with pytest.raises(TrackerUnreachableError, match="newer one wrote it"):
        readable_uri(settings)
    with (
        pytest.raises(TrackerUnreachableError) as caught,
        LocalServer(settings),
    ):
        pass
    first, *said = str(caught.value).splitlines()
    assert "ended with code 1" in first
    assert len(said) == 1
    assert "newer one wrote it" in said[0]

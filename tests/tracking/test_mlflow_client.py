"""MLflow's client as sweeper uses it: race-safe, quiet, and with sweeper's errors."""

from __future__ import annotations

import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from sweeper.errors import TrackerRefusedError, TrackerUnreachableError
from sweeper.settings import RUN_KEY_TAG, STUDY_ID_TAG, Owner, Settings
from sweeper.tracking import mlflow as server

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def name() -> str:
    return f"study-{uuid.uuid4().hex[:8]}"


def test_importing_the_tracker_loads_neither_mlflow_nor_torch() -> None:
    program = (
        "import sys, sweeper.tracking\n"
        "print([m for m in ('mlflow', 'torch', 'optuna', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.mlflow
def test_many_ask_for_one_experiment_at_once_and_get_the_same(
    mlflow_server: str, name: str
) -> None:
    clients = [server.connect(mlflow_server) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        ids = set(threads.map(lambda client: server.experiment_id(client, name), clients))
    assert len(ids) == 1


@pytest.mark.mlflow
def test_a_deleted_experiment_comes_back(mlflow_server: str, name: str) -> None:
    client = server.connect(mlflow_server)
    first = server.experiment_id(client, name)
    client.delete_experiment(first)
    assert server.experiment_id(client, name) == first
    assert client.get_experiment(first).lifecycle_stage == "active"


@pytest.mark.mlflow
def test_runs_are_found_by_their_key(mlflow_server: str, name: str) -> None:
    client = server.connect(mlflow_server)
    experiment = server.experiment_id(client, name)
    assert server.find_run(client, experiment, f"{name}/1") is None
    assert server.run_ids(client, name) == {}
    assert server.run_ids(client, "no such study") == {}
    ids = {
        f"{name}/{number}": server.create_run(
            client,
            experiment,
            name=f"{number:04d}",
            start_time_ms=1000 + number,
            tags={RUN_KEY_TAG: f"{name}/{number}"},
        )
        for number in (1, 11, 2)
    }
    foreign = client.create_run(experiment)
    assert server.run_ids(client, name) == ids
    found = server.find_run(client, experiment, f"{name}/1")
    assert found is not None
    assert found.info.run_id == ids[f"{name}/1"] != foreign.info.run_id
    with pytest.raises(ValueError, match="quote"):
        server.find_run(client, experiment, "it's")


@pytest.mark.mlflow
@pytest.mark.parametrize("most", [100, 3])
def test_a_run_is_found_among_those_of_other_studies_in_one_call_where_that_suffices(
    mlflow_server: str, name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Studies of one name on one server: their runs have the same keys."""
    monkeypatch.setattr(server, "_OLDEST", most)
    client = server.connect(mlflow_server)
    experiment, key = server.experiment_id(client, name), f"{name}/0"
    for began, identity in enumerate(["a", "b", "c", "mine", "mine"], 1):
        server.create_run(
            client,
            experiment,
            name=f"{identity}, {began}",
            start_time_ms=began,
            tags={RUN_KEY_TAG: key, STUDY_ID_TAG: identity},
        )
    asked: list[str] = []
    search = client.search_runs

    def counted(*arguments: Any, filter_string: str, **more: Any) -> Any:
        asked.append(filter_string)
        return search(*arguments, filter_string=filter_string, **more)

    monkeypatch.setattr(client, "search_runs", counted)
    found = server.find_run(client, experiment, key, Owner(identity="mine"))
    assert found is not None
    assert found.info.run_name == "mine, 4"
    assert len(asked) == (1 if most == 100 else 2)
    assert server.find_run(client, experiment, key, Owner(identity="nobody")) is None


@pytest.mark.mlflow
def test_an_artifact_that_is_not_there_is_refused(
    mlflow_server: str, name: str, tmp_path: Path
) -> None:
    client = server.connect(mlflow_server)
    run_id = server.create_run(
        client, server.experiment_id(client, name), name="0001", start_time_ms=1, tags={}
    )
    with pytest.raises(TrackerRefusedError, match=r"weights\.safetensors"):
        server.download_artifact(client, run_id, "weights/weights.safetensors", tmp_path)


def test_a_server_that_is_not_there_is_out_of_reach() -> None:
    client = server.connect(NOWHERE)
    with pytest.raises(TrackerUnreachableError, match=r"experiment 'x'.*Connection refused"):
        server.experiment_id(client, "x")


def test_whatever_answers_with_something_else_is_out_of_reach(proxy_of_html: str) -> None:
    client = server.connect(proxy_of_html)
    with pytest.raises(TrackerUnreachableError):
        server.run_ids(client, "x")


@pytest.fixture
def proxy_of_html(tmp_path: Path):
    """A web server that knows nothing of MLflow."""
    import http.server
    import threading
    from functools import partial

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    web = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Silent, directory=str(tmp_path))
    )
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        ("INVALID_PARAMETER_VALUE", "Changing param values is not allowed", TrackerRefusedError),
        ("RESOURCE_DOES_NOT_EXIST", "Run 'x' not found", TrackerRefusedError),
        ("TEMPORARILY_UNAVAILABLE", "(sqlite3.OperationalError)", TrackerUnreachableError),
        ("REQUEST_LIMIT_EXCEEDED", "slow down", TrackerUnreachableError),
        ("UNAUTHENTICATED", "who are you", TrackerUnreachableError),
        ("BAD_REQUEST", "QueuePool limit of size 5 overflow 10", TrackerUnreachableError),
        ("BAD_REQUEST", "(sqlite3.IntegrityError) UNIQUE", server.ServerFailedError),
        ("INTERNAL_ERROR", "", server.ServerFailedError),
    ],
)
def test_errors_say_whether_trying_again_can_help(code: str, message: str, expected: type) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    with (
        pytest.raises(expected, match="could not do a thing") as caught,
        server.translated("do a thing"),
    ):
        raise MlflowException(message, error_code=ErrorCode.Value(code))
    assert type(caught.value) is expected
    assert isinstance(caught.value.__cause__, MlflowException)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (requests.ConnectionError("refused"), TrackerUnreachableError),
        (OSError(28, "No space left on device"), TrackerUnreachableError),
        (PermissionError(13, "Permission denied"), TrackerRefusedError),
        (FileNotFoundError(2, "No such file"), TrackerRefusedError),
    ],
)
def test_errors_of_disk_and_network_are_ours(error: OSError, expected: type) -> None:
    with pytest.raises(expected), server.translated("do a thing"):
        raise error


def test_what_the_user_set_for_mlflow_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    server.connect(NOWHERE)
    import os

    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


@pytest.mark.mlflow
def test_a_whole_run_prints_nothing(mlflow_server: str, name: str, tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from sweeper.tracking import RunStart, SpoolTracker
with SpoolTracker(Path(sys.argv[1]), sys.argv[2], gather_s=0.01) as tracker:
    tracker.start(RunStart(key=sys.argv[3] + "/1", experiment=sys.argv[3], name="0001",
                           start_time_ms=1, params={"long": "x" * 9000},
                           dataset={"name": "d", "digest": "1", "source": "s"}))
    tracker.log(sys.argv[3] + "/1", {"a": float("nan")}, 1, 1)
    tracker.artifact(sys.argv[3] + "/1", Path(sys.argv[4]))
    tracker.end(sys.argv[3] + "/1", status="FINISHED", end_time_ms=2)
    assert tracker.flush(30) == 0
"""
    file = tmp_path / "f.txt"
    file.write_text("x")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "spool"), mlflow_server, name, str(file)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(server.run_ids(server.connect(mlflow_server), name)) == 1


def test_addresses_lead_to_the_page_of_a_run() -> None:
    training = "?workflowType=machine_learning"  # or the pages are about prompts and traces
    assert (
        server.run_address("http://h:1/", "7", "ab")
        == f"http://h:1/#/experiments/7/runs/ab{training}"
    )
    assert server.run_address("https://h", "7") == f"https://h/#/experiments/7/runs{training}"
    assert server.run_address(Settings.resolve(home="/x").embedded_tracking_uri, "7") is None

"""Metric histories are read back in bulk, from a server and from its database without one."""

from __future__ import annotations

import math
import socket
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from sweeper.errors import TrackerUnreachableError
from sweeper.settings import RUN_KEY_TAG, Settings
from sweeper.tracking import history, mlflow
from sweeper.tracking.batch import Batch, Point

pytestmark = pytest.mark.mlflow

STUDY = "a study"
RUNS = 3
EPOCHS = 5


def settings_of(home: Path, address: str | None = None) -> Settings:
    environment = {"MLFLOW_TRACKING_URI": address} if address else {}
    return Settings.resolve(home=home, environment=environment)


@pytest.fixture(scope="module")
def written(mlflow_server: str) -> str:
    """The server's address, with runs of a study: five epochs of two metrics each, and oddities."""
    client = mlflow.connect(mlflow_server)
    experiment = mlflow.experiment_id(client, STUDY)
    now = time.time_ns() // 1_000_000
    for number in range(RUNS):
        run_id = mlflow.create_run(
            client,
            experiment,
            name=f"{number:04d}",
            start_time_ms=now + number,
            tags={RUN_KEY_TAG: f"{STUDY}/{number}", "sweeper.cpu": "abacus"},
        )
        points = [
            Point(name=name, value=number + epoch / 10, time_ms=now + epoch, step=epoch)
            for name in ("train_loss", "val_loss")
            for epoch in reversed(range(1, EPOCHS + 1))
        ]
        points.append(Point(name="train_loss", value=99.0, time_ms=now + 500, step=2))
        points.append(Point(name="val_accuracy", value=math.nan, time_ms=now, step=1))
        mlflow.log_batch(client, run_id, Batch(metrics=points))
    mlflow.create_run(client, experiment, name="foreign", start_time_ms=now, tags={})
    return mlflow_server


@pytest.fixture(params=["http", "sqlite"])
def settings(request: pytest.FixtureRequest, written: str, tmp_path: Path) -> Settings:
    """Settings that reach the runs over the server, and in a copy of its database without one."""
    if request.param == "http":
        return settings_of(tmp_path, written)
    experiment = mlflow.connect(written).get_experiment_by_name(STUDY)
    assert experiment is not None
    artifacts = Path(unquote(urlsplit(experiment.artifact_location).path)).parent
    home = tmp_path / "copy of the home"
    home.mkdir()
    for file in artifacts.parent.glob("mlflow.db*"):
        (home / file.name).write_bytes(file.read_bytes())
    return settings_of(home)


def test_every_run_has_its_tags_and_its_values_by_epoch(settings: Settings) -> None:
    found = history.records(settings, STUDY)
    assert sorted(found) == [f"{STUDY}/{number}" for number in range(RUNS)]
    for number in range(RUNS):
        run = found[f"{STUDY}/{number}"]
        assert run.tags["sweeper.cpu"] == "abacus"
        wanted = {epoch: pytest.approx(number + epoch / 10) for epoch in range(1, EPOCHS + 1)}
        assert run.history["val_loss"] == wanted
        assert run.history["train_loss"] == wanted  # the first value at a step stays
        assert math.isnan(run.history["val_accuracy"][1])
        assert "train_accuracy" not in run.history


def test_only_what_is_asked_for_is_read(settings: Settings) -> None:
    found = history.histories(settings, STUDY, ["val_loss"])
    assert {tuple(metrics) for metrics in found.values()} == {("val_loss",)}


def test_an_answer_that_was_cut_is_asked_for_in_halves(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = history.histories(settings, STUDY, ["train_loss"])
    asked: list[int] = []
    bulk = history._bulk

    def counted(client: object, run_ids: list[str], metric: str) -> list[history.Point]:
        asked.append(len(run_ids))
        return bulk(client, run_ids, metric)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(history, "_bulk", counted)
    monkeypatch.setattr(history, "_POINTS_A_CALL", 7)
    assert history.histories(settings, STUDY, ["train_loss"]) == whole
    assert asked == [3, 2]


def test_a_server_without_the_bulk_query_is_asked_run_by_run(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, written)
    whole = history.histories(settings, STUDY, ["val_loss"])
    monkeypatch.setattr(history, "_ENDPOINT", "/ajax-api/2.0/mlflow/metrics/nothing-here")
    assert history.histories(settings, STUDY, ["val_loss"]) == whole


def test_what_was_never_tracked_is_empty(settings: Settings, tmp_path: Path) -> None:
    assert history.records(settings, "no such study") == {}
    assert history.records(settings_of(tmp_path / "nothing"), STUDY) == {}


def test_a_server_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    settings = settings_of(tmp_path, f"http://127.0.0.1:{port}")
    with pytest.raises(TrackerUnreachableError, match="list the runs"):
        history.records(settings, STUDY)

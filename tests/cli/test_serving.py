"""What the commands of a cluster refuse before they do anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sweeper import store
from sweeper.cli import app, serving
from sweeper.errors import StoreUnreachableError, UsageError
from sweeper.service import board as boards
from sweeper.service.board import Board
from sweeper.settings import Settings
from sweeper.worker import Signals

SECRET = "postgresql+psycopg://me:geheim@127.0.0.1:1/sweeps"


def refused(*words: str, **environment: str) -> str:
    result = CliRunner().invoke(app, list(words), env=environment)
    assert isinstance(result.exception, UsageError), result.output
    return str(result.exception)


@pytest.mark.parametrize("command", ["status", "workers", "worker", "controller", "ui"])
@pytest.mark.parametrize("url", [SECRET, "postgresql://me@host/db?password=geheim"])
def test_a_password_is_refused_on_a_command_line(command: str, url: str) -> None:
    said = refused(command, "--store", url)
    assert "PGPASSFILE" in said
    assert "SWEEPER_STORE_FILE" in said
    assert "geheim" not in said


def test_a_password_in_the_environment_is_not_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["status", "--home", str(tmp_path)], env={"SWEEPER_STORE": SECRET}
    )
    assert "must answer" in str(result.exception)
    assert "geheim" not in str(result.exception)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("0.0.0.0:13000", "--insecure-grpc"),
        ("10.0.0.1:13000", "neither login nor encryption"),
        ("[::]:13000", "--insecure-grpc"),
        ("controller.example.org", "--insecure-grpc"),
        ("127.0.0.1:port", "HOST:PORT"),
        (":13000", "HOST:PORT"),
    ],
)
def test_the_proxy_listens_on_this_machine_alone_unless_allowed(place: str, said: str) -> None:
    assert said in refused("controller", "--grpc", place)


def test_a_file_may_hold_the_stores_url(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    environment = {"SWEEPER_STORE_FILE": str(file)}
    assert Settings.resolve(environment=environment).store_url == SECRET
    also = {**environment, "SWEEPER_STORE": "sqlite:////x.db"}
    assert Settings.resolve(environment=also).store_url == "sqlite:////x.db"
    file.write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        Settings.resolve(environment=environment)
    with pytest.raises(UsageError, match="cannot be read"):
        Settings.resolve(environment={"SWEEPER_STORE_FILE": str(tmp_path / "missing")})


def test_mlflow_is_beside_a_postgresql_store_and_in_the_home_folder_without() -> None:
    beside = Settings.resolve(environment={"SWEEPER_STORE": SECRET}).embedded_tracking_uri
    assert beside == "postgresql+psycopg://me:geheim@127.0.0.1:1/sweeps_mlflow"
    home = Settings.resolve(home="/h", environment={}).embedded_tracking_uri
    assert home == "sqlite:////h/mlflow.db"


@pytest.mark.parametrize("before", [True, False], ids=["as it starts", "later"])
def test_a_controller_that_waits_for_its_store_is_not_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    board, signals = Board(), Signals()
    board._turned -= boards.TURN_S
    assert board.stuck

    def away(*_: object) -> Any:
        signals.stop()
        raise StoreUnreachableError

    if before:
        monkeypatch.setattr(store, "open_store", away)
        assert serving._open(Settings.resolve(home=tmp_path), board, signals) is None
    else:
        service = SimpleNamespace(look_after=lambda: "")
        finisher = SimpleNamespace(close=lambda _timeout_s: True)
        watch: Any = SimpleNamespace(look=away, board=board, service=service, finisher=finisher)
        serving._look_after(watch, signals)
    assert board.trouble
    assert not board.stuck


def test_no_workers_is_said(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["workers", "--home", str(tmp_path)])
    assert "nobody works on this store" in result.output

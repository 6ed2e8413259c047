"""A store's URL that cannot be one is the user's mistake, to every command that takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from cli.conftest import STUDY

from sweeper.cli import app
from sweeper.errors import UsageError

SECRET = "s3cr3t"
MALFORMED = {
    "": "leave the option out",
    " ": "leave the option out",
    "foo": "something that is not a URL",
    "sweeps.db": "something that is not a URL",
    "/tmp/sweeps.db": "something that is not a URL",
    "mysql://host/db": "SQLite or PostgreSQL",
    "postgres://host/db": "write sqlite:///…, postgresql+psycopg://",
    "http://host/db": "SQLite or PostgreSQL",
    "sqlite://": "write sqlite:///",
    "sqlite:///": "write sqlite:///",
    "sqlite://sweeps.db": "two slashes for three",
    "postgresql://": "must name a database",
    "postgresql://host": "must name a database",
    "postgresql://host:5432/": "must name a database",
    "postgresql://host:notaport/db": "must be a number from 1 to 65535",
    "postgresql://host:99999/db": "must be a number from 1 to 65535",
    "postgresql://host:0/db": "must be a number from 1 to 65535",
    "postgresql://[::1/db": "must be a number from 1 to 65535",
    "postgresql+nonsense://host/db": "'postgresql+nonsense'",
    "postgresql+asyncpg://host/db": "not asynchronous",
    "sqlite+aiosqlite:///sweeps.db": "not asynchronous",
    "grpc://": "must be given as grpc://host:port",
    "grpc://host:x": "must be a number from 1 to 65535",
    "grpc+tls://host": "SQLite or PostgreSQL",
}
"""What may be typed, and what sweeper says to it."""

SWEEPER: Any = typer.main.get_command(app)
COMMANDS = {
    name: command
    for name, command in SWEEPER.commands.items()
    if any(parameter.name == "store" for parameter in command.params)
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    return file


def refusal(*words: str) -> str:
    """What sweeper says to a command that it must refuse."""
    with pytest.raises(UsageError) as caught:
        SWEEPER.main(words, prog_name="sweeper", standalone_mode=False)
    return str(caught.value)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_what_cannot_be_a_store(
    name: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    asked = [
        p.name for p in COMMANDS[name].params if p.param_type_name == "argument" and p.required
    ]
    given = {"files": str(study), "more": "3"}
    words = [name, *(given.get(each, "small") for each in asked)]
    said = {url: refusal(*words, "--store", url) for url in MALFORMED}
    assert {url: text for url, text in said.items() if MALFORMED[url] not in text} == {}
    assert [path.name for path in study.parent.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize("words", [["--launcher", "slurm"], ["--launcher", "ray"], ["--detach"]])
def test_a_launch_on_a_cluster_refuses_a_bad_port(words: list[str], study: Path) -> None:
    url = "postgresql://db.example.org:notaport/sweeps"
    said = refusal("launch", str(study), *words, "--store", url)
    assert MALFORMED["postgresql://host:notaport/db"] in said


def test_a_malformed_url_from_elsewhere_is_refused_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "url"
    for url in (f"postgresql://me:{SECRET}@host:port/db", f"mysql://me:{SECRET}@host/db", SECRET):
        file.write_text(url)
        for name, value in (("SWEEPER_STORE", url), ("SWEEPER_STORE_FILE", str(file))):
            monkeypatch.setenv(name, value)
            said = refusal("status")
            monkeypatch.delenv(name)
            assert "store" in said and "must be" in said
            assert SECRET not in said

"""Variables, folders and streams that are not as a command wants them."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.conftest import Sweeper
from rich.console import Console
from typer.testing import CliRunner

from sweeper.cli import app
from sweeper.cli.checks import examine
from sweeper.cli.printing import redraws
from sweeper.errors import UsageError
from sweeper.settings import Settings


def closed(*numbers: int) -> Callable[[], None]:
    """What a shell does for ``>&-``."""

    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("variable", ["SWEEPER_HOME", "SWEEPER_DATA", "SWEEPER_STORE_FILE"])
def test_the_folder_of_somebody_unknown_is_wrong_usage(variable: str) -> None:
    with pytest.raises(UsageError, match=f"{variable} must be a path"):
        Settings.resolve(environment={variable: "~nobody-of-that-name/x"})


def test_a_secret_that_is_no_text_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="must name a text file"):
        Settings.resolve(environment={"SWEEPER_STORE_FILE": f"{tmp_path}/secret"})


@pytest.mark.parametrize("inside", ["", "/home"])
def test_a_home_that_is_a_file_is_wrong_usage(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is none"):
        Settings.resolve(home=f"{tmp_path}/file{inside}", environment={})


def test_a_home_without_a_name_is_not_the_current_folder() -> None:
    found = CliRunner().invoke(app, ["status", "--home", ""])
    assert isinstance(found.exception, UsageError)
    assert "leave the option out" in str(found.exception)


def test_doctor_looks_at_the_store_that_is_set_and_creates_none(tmp_path: Path) -> None:
    from sweeper.store import open_store

    def said(name: str) -> str:
        settings = Settings.resolve(
            home=tmp_path / "home", store=f"sqlite:///{tmp_path}/{name}", environment={}
        )
        return next(finding.found for finding in examine(settings) if finding.subject == "store")

    open_store(f"sqlite:///{tmp_path}/there.db").close()
    assert "answers, 0 studies" in said("there.db")
    assert "none yet" in said("missing.db")
    assert not (tmp_path / "missing.db").exists()


def test_a_studys_logs_are_not_where_the_server_writes_its_own(tmp_path: Path) -> None:
    settings = Settings.resolve(home=tmp_path, environment={})
    assert settings.logs("mlflow.log") not in {settings.server_log, settings.server_log.parent}


@pytest.mark.parametrize(("words", "code"), [(["study.yaml"], 0), (["missing.yaml"], 2)])
@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)])
def test_a_closed_stream_changes_no_exit_code(
    sweeper: Sweeper, words: list[str], code: int, numbers: tuple[int, ...]
) -> None:
    sweeper.write()
    process = sweeper.start("validate", *words, preexec_fn=closed(*numbers))
    said = "".join(process.communicate(timeout=120))
    assert process.returncode == code
    assert "Traceback" not in said


def test_what_a_stream_cannot_spell_is_spelled_out(sweeper: Sweeper) -> None:
    sweeper.write("ré.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "sweeper", "validate", "ré.yaml"],
        cwd=sweeper.folder,
        env={**sweeper.environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == b"r\\xe9.yaml: valid\n"


def test_what_init_could_not_write_is_not_in_the_way_of_the_next_try(sweeper: Sweeper) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    process = sweeper.start("init", preexec_fn=no_room)
    said = "".join(process.communicate(timeout=120))
    assert (process.returncode, "cannot be written" in said) == (2, True)
    sweeper.run("init")


def test_asking_for_colours_makes_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert redraws(Console(file=Terminal()))
    assert not redraws(Console(file=io.StringIO()))
    monkeypatch.setenv("TERM", "dumb")
    assert not redraws(Console(file=Terminal()))

"""The README is true: its commands exist, and what it tells a person to type works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli.conftest import Sweeper
from typer.main import get_command

from sweeper.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command_after(marker: str) -> str:
    """The shell command below ``<!-- marker -->``."""
    found = re.search(rf"<!-- {marker} -->\n```sh\n(.+?)\n```", README, re.DOTALL)
    if found is None:
        raise AssertionError(f"the README has no command marked {marker}")
    return found[1]


def test_every_command_is_in_the_readme() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group has commands
    documented = set(re.findall(r"^\| `sweeper (\w+)", README, re.MULTILINE))
    assert documented == set(commands)


def test_every_setting_is_in_the_readme() -> None:
    source = (ROOT / "sweeper/settings.py").read_text(encoding="utf-8")
    assert set(re.findall(r"SWEEPER_[A-Z]+", source)) <= set(re.findall(r"SWEEPER_[A-Z]+", README))


def test_local_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "studies/README.md"]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_example_study_is_valid(sweeper: Sweeper) -> None:
    example = re.search(r"## A study file\n+```yaml\n(.+?)```", README, re.DOTALL)
    assert example is not None
    file = sweeper.folder / "example.yaml"
    file.write_text(example[1])
    sweeper.run("validate", file)


def test_the_reference_of_study_files_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/write-docs"), "--check"],
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_test_command_calls_the_one_door() -> None:
    assert command_after("test").endswith("scripts/check")


@pytest.mark.mlflow
def test_the_first_command_finds_a_good_model(sweeper: Sweeper) -> None:
    words = shlex.split(command_after("run").rsplit("&&", 1)[1])
    assert words[0] == ".venv/bin/sweeper"
    file = ROOT / words[-1]
    result = sweeper.json(*words[1:-1], file)
    assert result["best"]["metrics"]["test_accuracy"] > 0.95
    assert sum(result["trials"].values()) == 12
    assert result["seconds"] < 180
    report = sweeper.folder / ".sweeper/reports" / result["study"] / "index.html"
    assert report.exists()

"""`sweeper report` writes where it is told, says where, and explains what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sweeper.cli import app
from sweeper.errors import StudyNotFoundError, UsageError
from sweeper.settings import Settings
from sweeper.store import open_store, studies, tickets
from sweeper.study.spec import StudySpec


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with two studies whose trials are waiting."""
    folder = tmp_path / "a home"
    settings = Settings.resolve(home=folder, environment={})
    store = open_store(settings.store_url)
    for name in ("one", "two"):
        spec = StudySpec.model_validate(
            {"name": name, "data": {"name": "digits"}, "model": {"name": "mlp"}}
        )
        with store.exclusively():
            study = studies.create(store, spec)
            assert study is not None
            tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=False))
    store.close()
    return folder


def run(*words: str | Path, fails: type[Exception] | None = None) -> Any:
    result = CliRunner(env={"MLFLOW_TRACKING_URI": ""}).invoke(app, list(map(str, words)))
    if fails is None:
        assert result.exception is None, result.output
    else:
        assert isinstance(result.exception, fails)
    return result


def test_a_report_is_in_the_home_folder_and_its_page_is_named(home: Path) -> None:
    result = run("report", "one", "--home", home, "--no-model")
    page = home / "reports" / "one" / "index.html"
    assert result.stdout.strip() == str(page)
    assert "Left out" in page.read_text("utf-8")
    assert "report: reading the runs from MLflow" in result.stderr


def test_json_names_every_file(home: Path, tmp_path: Path) -> None:
    result = run("report", "one", "--home", home, "--out", tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert found["page"] == str(tmp_path / "out" / "index.html")
    assert found["page"] in found["files"]
    assert all(Path(file).is_file() for file in found["files"])
    assert {Path(file).suffix for file in found["files"]} == {".html", ".md", ".tex", ".csv"}


def test_several_studies_are_compared_on_one_page(home: Path) -> None:
    result = run("report", "one", "two", "--home", home)
    page = home / "reports" / "compare-one-two" / "index.html"
    assert result.stdout.strip() == str(page)
    assert "one and two" in page.read_text("utf-8")


def test_a_study_that_is_not_there_and_one_named_twice(home: Path) -> None:
    result = run("report", "onne", "--home", home, fails=StudyNotFoundError)
    assert "did you mean" in str(result.exception)
    run("report", "one", "one", "--home", home, fails=UsageError)

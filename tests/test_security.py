"""Hostile studies, stores and messages: nothing runs, nothing leaks, nothing is overwritten."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from sweeper import checkpoints, provenance
from sweeper.cli import app
from sweeper.cli.plain import PlainFormatter, plain
from sweeper.cli.printing import PlainConsole
from sweeper.config.model import Custom
from sweeper.errors import SweeperError, UsageError
from sweeper.models import check_custom
from sweeper.private import private_file, private_folder, redacted
from sweeper.settings import Settings, masked
from sweeper.store import (
    Outcome,
    Store,
    StoredStudy,
    glance,
    held,
    open_store,
    queue,
    standing,
    studies,
    tickets,
)
from sweeper.store import attributes as attr
from sweeper.study.parse import loads
from sweeper.study.spec import StudySpec
from sweeper.tracking import MemoryTracker, mlflow
from sweeper.tracking.journal import Journal
from sweeper.tracking.mlflow import run_address
from sweeper.worker import Signals, Worker

SECRET = "s3cr3t-Pa55"
SMALL = {
    "name": "small",
    "data": {"name": "digits", "limit": 200},
    "model": {"name": "mlp", "width": 8, "layers": 1},
    "train": {"epochs": 1, "batch_size": 50},
    "search": {"trials": 1, "sampler": "random"},
}
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\u202etxt.exe\r\b\x00"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.resolve(home=tmp_path / "home", environment={"SWEEPER_DATA": str(tmp_path)})


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    opened = open_store(settings.store_url)
    yield opened
    opened.close()


def enqueue(store: Store, **sections: Any) -> StoredStudy:
    spec = StudySpec.model_validate({**SMALL, **sections})
    with store.exclusively():
        study = studies.create(store, spec)
        assert study is not None
        tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=True))
    return study


# --- passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql://me:{SECRET}@host/db", "postgresql://me:***@host/db"),
        (f"postgresql+psycopg://me:a/{SECRET}@host:1/db", "postgresql+psycopg://me:***@host:1/db"),
        (f"postgresql://host/db?password={SECRET}&x=1", "postgresql://host/db?password=***&x=1"),
        (f"https://{SECRET}@host/path", "https://***@host/path"),
        (f"http://me:{SECRET}@host:5000", "http://***@host:5000"),
        (f"s3://key:{SECRET}@bucket/x", "s3://key:***@bucket/x"),
        (f"host=h user=me password={SECRET} dbname=d", "host=h user=me password=*** dbname=d"),
        (
            "model.token_hidden=64, a@b, http://h/#/x@y",
            "model.token_hidden=64, a@b, http://h/#/x@y",
        ),
    ],
)
def test_a_text_loses_its_secrets_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(f"see {text} there") == f"see {shown} there"
    assert SECRET not in masked(text)
    assert SECRET not in str(SweeperError(text))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@127.0.0.1:1/db",
        f"postgresql://me:{SECRET}@127.0.0.1:port/db",
        f"postgresql://127.0.0.1:1/db?user=me&password={SECRET}",
        f"mysql://me:{SECRET}@127.0.0.1/db",
        f"grpc://me:{SECRET}@127.0.0.1:1",
        f"not a url {SECRET}@",
    ],
)
def test_a_store_that_cannot_be_opened_keeps_its_password(url: str) -> None:
    with pytest.raises(SweeperError) as error:
        open_store(url)
    assert SECRET not in str(error.value)


def test_an_mlflow_server_out_of_reach_keeps_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://me:{SECRET}@127.0.0.1:1"
    with pytest.raises(SweeperError) as error, mlflow.translated(f"ask {masked(uri)}"):
        mlflow.connect(uri).search_experiments(max_results=1)
    assert SECRET not in str(error.value)
    assert "127.0.0.1" in str(error.value)


def test_the_command_in_a_report_and_links_to_runs_hold_no_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"postgresql://me:{SECRET}@host/db"
    monkeypatch.setattr(sys, "argv", ["sweeper", "launch", f"--store={url}", "--store", url])
    assert SECRET not in provenance.command()
    assert "postgresql://me:***@host/db" in provenance.command()
    assert run_address(f"https://me:{SECRET}@host/x", "1") == (
        "https://host/x/#/experiments/1/runs?workflowType=machine_learning"
    )


def test_doctor_and_status_say_where_the_store_is_without_its_password() -> None:
    url = f"postgresql://me:{SECRET}@127.0.0.1:1/db"
    for command in (["status"], ["doctor"], ["trials", "x"], ["doctor", "--json"]):
        done = CliRunner().invoke(app, [*command, "--store", url])
        assert SECRET not in done.output + str(done.exception), command
        if isinstance(done.exception, SweeperError):
            assert done.exception.exit_code in {2, 3}


# --- code


PLANTED = """
    from pathlib import Path
    Path({mark!r}).touch()
    from torch import nn
    def model(classes, channels, height, width):
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package on the path whose import leaves a mark; where that mark would be."""
    mark = tmp_path / "was imported"
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "planted_models.py").write_text(textwrap.dedent(PLANTED.format(mark=str(mark))))
    monkeypatch.syspath_prepend(folder)
    yield mark
    sys.modules.pop("planted_models", None)


def worker(store: Store, settings: Settings, study: str | None, **options: Any) -> Worker:
    return Worker(
        store=store, tracker=MemoryTracker(), settings=settings, study=study, name="me", **options
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"name": "planted_models:model"}},
        {"parameters": {"model.name": ["mlp", "planted_models:model"]}},
        {
            "search": {"sampler": "reference"},
            "reference": {
                "source": "us",
                "trials": [{"params": {"model.name": "planted_models:model"}}],
            },
        },
    ],
    ids=["model", "parameter", "reference"],
)
def test_a_worker_imports_nothing_for_a_study_of_the_store(
    store: Store, settings: Settings, planted: Path, sections: dict[str, Any]
) -> None:
    study = enqueue(store, **sections)
    assert study.spec.imports == ("planted_models:model",)
    with pytest.raises(UsageError, match=r"planted_models:model.*--allow-imports"):
        worker(store, settings, "small").run()
    assert not planted.exists()
    assert standing(store, study).counts["waiting"] == 1


def test_a_worker_that_may_imports_the_model(
    store: Store, settings: Settings, planted: Path
) -> None:
    study = enqueue(store, model={"name": "planted_models:model"})
    worker(store, settings, "small", allow_imports=True).run()
    assert planted.exists()
    assert standing(store, study).counts["complete"] == 1


def test_a_worker_of_all_studies_passes_one_over_and_says_so_once(
    store: Store, settings: Settings, planted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    enqueue(store, model={"name": "planted_models:model"})
    other = enqueue(store, name="other", search={"trials": 2, "sampler": "random"})
    signals = Signals()

    class StopsAfterTwo(MemoryTracker):
        def end(self, key: str, **facts: Any) -> None:
            super().end(key, **facts)
            if standing(store, other).over:
                signals.stop()

    serving = worker(store, settings, None, signals=signals)
    serving.tracker = StopsAfterTwo()
    with caplog.at_level(logging.WARNING):
        serving.run()
    assert standing(store, other).counts["complete"] == 2
    assert not planted.exists()
    assert len([line for line in caplog.messages if "--allow-imports" in line]) == 1


def test_a_trial_that_was_smuggled_into_the_store_is_invalid(
    store: Store, settings: Settings, planted: Path
) -> None:
    study = enqueue(store)
    trial = study.study.get_trials()[0]
    smuggled = {"model": {"name": "planted_models:model"}}
    store.storage.set_trial_user_attr(trial._trial_id, attr.SET, smuggled)
    store.storage.set_trial_user_attr(trial._trial_id, attr.FIXED, True)
    worker(store, settings, "small").run()
    (row,) = standing(store, study).rows
    assert (row.state, row.outcome) == ("failed", str(Outcome.INVALID))
    assert "must not be imported" in str(row.error)
    assert not planted.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("os:system", "subprocess:run", "builtins:eval", "runpy:run_path", "pip:main"),
        *("torch.hub:load", "torch:load", "torch.utils.cpp_extension:load_inline"),
        *("sweeper.provenance:subprocess", "sweeper.launchers.local:which"),
    ],
)
def test_functions_that_run_what_they_are_given_are_no_models(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import sweeper.launchers.local

    monkeypatch.setattr(sweeper.launchers.local, "which", shutil.which, raising=False)
    with pytest.raises(UsageError, match=r"Python's own|torch\.nn\.Module|callable"):
        check_custom(Custom(name=name))


def test_a_class_of_torchs_is_a_model() -> None:
    assert check_custom(Custom.model_validate({"name": "torch.nn:Identity"}))


# --- names


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x",
            "a/b",
            "..",
            ".hidden",
            "",
            "a b",
            "a\x00b",
            "a\n",
            "x" * 101,
            "C:\\x",
            "~",
            "%2e",
        ),
        *("<script>", "'; DROP TABLE trials; --", "$(id)", "-rf", "é", "a:b"),
    ],
)
def test_a_studys_name_is_a_harmless_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        StudySpec.model_validate({**SMALL, "name": name})


@pytest.mark.parametrize("name", ["../../evil", "other", "<b>"])
def test_a_study_whose_name_in_the_store_is_another_than_its_specs_is_not_opened(
    store: Store, name: str
) -> None:
    made = optuna.create_study(study_name=name, storage=store.storage)
    made.set_user_attr(attr.SPEC, StudySpec.model_validate(SMALL).stored())
    with pytest.raises(UsageError, match="must have a spec of that name"):
        studies.load(store, name)


def test_a_spec_that_the_store_has_spoilt_is_an_error_in_one_line(store: Store) -> None:
    made = optuna.create_study(study_name="small", storage=store.storage)
    made.set_user_attr(attr.SPEC, '{"name": "small", "data": {"name": "../../etc"}}')
    with pytest.raises(UsageError, match=r"that this version of sweeper can read") as error:
        studies.load(store, "small")
    assert "\n" not in str(error.value)


def test_a_workers_name_cannot_leave_the_spool(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    journal = Journal(spool, "../../evil/\x00;rm -rf /\n" + "x" * 300)
    assert journal.path.parent == spool
    assert len(journal.path.name) < 120
    assert journal.path.name.isprintable()


# --- texts


def test_what_a_terminal_obeys_is_shown_instead() -> None:
    shown = plain(f"{ESCAPES}\nnext\ttab é 日本 🙂")
    assert shown.endswith("\nnext\ttab é 日本 🙂")
    assert not set("\x1b\x07\x9b\u202e\r\b\x00") & set(shown)
    assert shown.startswith("␛]0;owned␇␛[2J")


def test_rich_colours_itself_and_nothing_else_does() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=200, highlight=False)
    table = Table("head")
    table.add_row(Text(ESCAPES))
    table.add_row("[bold]bold[/]")
    console.print(table)
    console.print(ESCAPES, markup=False)
    written = file.getvalue()
    assert "\x1b[1m" in written  # its own bold
    assert "\x1b]" not in written and "\x1b[2J" not in written and "\x07" not in written


def test_log_lines_hold_neither_secrets_nor_escapes() -> None:
    record = logging.makeLogRecord({"msg": "%s", "args": (f"http://a:{SECRET}@h {ESCAPES}",)})
    line = PlainFormatter("%(message)s").format(record)
    assert SECRET not in line and "\x1b" not in line


HOSTILE = f"<script>alert(1)</script>[/bold][link=http://evil]{ESCAPES}'; DROP TABLE trials;--"


def test_hostile_texts_of_a_store_are_shown_by_every_command(
    store: Store, settings: Settings
) -> None:
    """Markup that rich would obey, or fail on, in every place that a store can fill."""
    study = enqueue(
        store,
        description=HOSTILE,
        model={"name": "planted_models:model", HOSTILE: HOSTILE},
        parameters={"optimizer.name": ["sgd", "adam"]},
        search={"trials": 3, "sampler": "random"},
        reference={"source": HOSTILE, "trials": [{"params": {"model.note": HOSTILE}}]},
    )
    for outcome, values in ((Outcome.COMPLETED, (0.5,)), (Outcome.CRASHED, ())):
        claimed = queue.claim(store, study.id, HOSTILE)
        assert claimed is not None
        facts = {attr.ERROR: HOSTILE, attr.SET: {f"model.{HOSTILE}": HOSTILE}, attr.FIXED: True}
        held.note(store, claimed, facts)
        held.finish(store, study.study, claimed, outcome=outcome, values=values)
    queue.claim(store, study.id, HOSTILE)
    home = ["--home", str(settings.home)]
    for command in ("status", "trials small", "best small", "trials small --json"):
        done = CliRunner().invoke(app, [*command.split(), *home], env={"SWEEPER_STORE": ""})
        assert done.exit_code == 0, (command, done.output, done.exception)
        assert not set("\x1b\x07\x9b\u202e\x00") & set(done.output), command
    from sweeper.cli.view import _LiveView

    file = io.StringIO()
    with _LiveView(PlainConsole(file=file, force_terminal=True, width=300), lambda: None) as live:
        live.show(glance.progress(store, study), 1, HOSTILE)
    assert "\x1b]" not in file.getvalue() and "\x07" not in file.getvalue()


def test_a_hostile_description_is_text_in_a_study_file() -> None:
    said = "<script>alert(1)</script> '; DROP TABLE x; -- $(touch /tmp/x) `id` {{7*7}} =1+1"
    text = f"name: a\ndescription: {said!r}\ndata: {{name: digits}}\nmodel: {{name: mlp}}\n"
    assert loads(text + "search: {trials: 1}\n").description == said


# --- files


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in folder.rglob("*")
    }


def test_what_a_worker_leaves_behind_is_its_owners_only(
    tmp_path: Path, open_umask: None, settings: Settings
) -> None:
    opened = open_store(settings.store_url)
    enqueue(opened, train={"epochs": 3, "batch_size": 50}, faults={"checkpoint_s": 0})
    seen: dict[str, int] = {}

    class Looks(MemoryTracker):
        def log(self, *words: Any) -> None:
            super().log(*words)
            seen.update(modes(settings.home))

    private_folder(settings.spool)  # as a tracker does before it writes
    journal = Journal(settings.spool, "me")
    journal.set_offset(3)
    journal.set_aside({"why": "refused"})
    journal.keep_file(Path(__file__))
    serving = worker(opened, settings, "small")
    serving.tracker = Looks()
    serving.run()
    opened.close()
    seen |= modes(settings.home)
    assert settings.home.stat().st_mode & 0o777 == 0o700
    assert {"optuna.db", "optuna.db-wal", "optuna.db.lock"} <= seen.keys()
    assert any(name.startswith("checkpoints/small-") for name in seen)
    assert {name: oct(mode) for name, mode in seen.items() if mode & 0o077} == {}


def test_a_private_file_keeps_what_is_in_it(tmp_path: Path, open_umask: None) -> None:
    folder = private_folder(tmp_path / "a" / "b")
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, folder.parent)] == ["0o700"] * 2
    file = folder / "x"
    file.write_text("kept")
    private_file(file)
    assert file.read_text() == "kept"
    private_folder(folder)
    with pytest.raises(FileExistsError):
        private_folder(file)


def test_a_private_file_keeps_the_locks_that_this_process_has_on_it(tmp_path: Path) -> None:
    """SQLite's are of that kind: closing any descriptor of the file would end them all."""
    file = tmp_path / "x"
    private_file(file)
    with file.open("rb+") as held:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        private_file(file)
        other = (
            "import fcntl, sys\n"
            "with open(sys.argv[1], 'rb+') as file:\n"
            "    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        )
        asked = subprocess.run(
            [sys.executable, "-c", other, str(file)], capture_output=True, check=False
        )
    assert b"BlockingIOError" in asked.stderr


def test_a_checkpoint_is_read_without_running_it(tmp_path: Path) -> None:
    """A pickle that would call ``os.system`` is set aside like any damaged file."""
    import hashlib
    import io as memory

    import torch

    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch '{mark}'",)

    stream = memory.BytesIO()
    torch.save({"training": Evil(), "epochs": [], "seconds": 0.0}, stream)
    body = stream.getvalue()
    folder = tmp_path / "kept" / "s" / "000000"
    folder.mkdir(parents=True)
    header = f"sweeper-checkpoint-1 d {hashlib.sha256(body).hexdigest()}\n".encode()
    (folder / "epoch-000001.ckpt").write_bytes(header + body)
    found = checkpoints.TrialCheckpoints(
        str(tmp_path / "kept"), "s", 0, digest="d", every=1, at_most_s=0
    )
    assert found.latest() is None
    assert not mark.exists()
    assert (folder / "epoch-000001.ckpt.damaged").exists()

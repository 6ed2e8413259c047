"""What finishing a study loads while the last trials train, and what it says of MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sweeper.service import finish
from sweeper.settings import Settings
from sweeper.store import open_store, studies
from sweeper.study.spec import StudySpec
from sweeper.tracking import Replayed


def test_all_that_is_loaded_ahead_is_there() -> None:
    """In a process of its own: a name that no longer exists would be passed over in silence."""
    code = (
        "import sys\n"
        "from sweeper.service import finish\n"
        "assert not set(finish._LATER) & set(sys.modules), 'it is loaded with finish itself'\n"
        "ahead = finish.Ahead()\n"
        "ahead.start()\n"
        "ahead.wait()\n"
        "print(*(name for name in finish._LATER if name not in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


class Service:
    """A tracking service that sends nothing, for a reason."""

    def __init__(self, sent: Replayed) -> None:
        self._sent = sent

    def replay(self) -> Replayed:
        return self._sent


def finished(folder: Path, sent: Replayed, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The problem that finishing a study of two trials ends with, and what it warned of."""
    settings = Settings.resolve(home=folder, environment={})
    settings.spool.mkdir(parents=True)
    for name in ("tiny", "other"):
        line = {"experiment": name, "key": f"{name}/0", "reason": f"{name} is too long"}
        (settings.spool / f"{name}.rejected.jsonl").write_text(json.dumps(line) + "\n")
    store = open_store(settings.store_url)
    spec = StudySpec.model_validate(
        {
            "name": "tiny",
            "data": {"name": "digits"},
            "model": {"name": "mlp"},
            "search": {"trials": 2, "sampler": "random"},
            "parameters": {"optimizer.lr": {"low": 1.0e-3, "high": 1.0e-2}},
        }
    )
    study = studies.create(store, spec)
    assert study is not None
    monkeypatch.setattr(finish.Finishing, "_report", lambda *_: None)
    warned: list[str] = []
    result = finish.Finishing(
        store=store,
        settings=settings,
        service=Service(sent),  # type: ignore[arg-type] # as much of it as is asked
        say=lambda _: None,
        warn=warned.append,
    ).finish(study)
    store.close()
    return result.problem, "\n".join(warned)


def test_what_mlflow_did_not_take_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a server that can be read but not written."""
    sent = Replayed(left=21, problem="could not create the run 0000: 403 Permission denied")
    problem, warned = finished(tmp_path, sent, monkeypatch)
    assert problem == sent.problem
    assert "403 Permission denied" in warned
    assert "sweeper sync" in warned


def test_what_mlflow_refused_of_the_study_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, warned = finished(tmp_path, Replayed(), monkeypatch)
    assert problem == ""
    assert "tiny is too long" in warned
    assert str(tmp_path / "spool" / "tiny.rejected.jsonl") in warned
    assert "other" not in warned

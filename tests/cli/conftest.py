"""Running sweeper as a person does: its own process, its own home folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from sweeper.launchers import forks

STUDY: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits", "limit": 300},
    "model": {"name": "mlp", "width": 16, "layers": 1},
    "train": {"epochs": 2, "batch_size": 50},
    "search": {"trials": 3, "sampler": "random"},
    "parameters": {"optimizer.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}},
    "faults": {"heartbeat_s": 1, "lost_after_s": 5},
}


@dataclass(frozen=True)
class Sweeper:
    """A home folder with a space in its name, and the command line in it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SWEEPER_", "MLFLOW_"))
        }
        tests = Path(__file__).parents[1]  # for models of a user's own
        return {
            **kept,
            "SWEEPER_DATA": str(self.folder / "data"),
            "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        }

    def write(self, file: str = "study.yaml", **sections: object) -> Path:
        path = self.folder / file
        path.write_text(yaml.safe_dump({**STUDY, **sections}, sort_keys=False))
        return path

    def start(self, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sweeper", *map(str, words)],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            umask=0,  # what is private must be so whatever the user's umask
            **options,
        )

    def run(self, *words: str | Path, code: int = 0, timeout_s: float = 240) -> str:
        """Standard output of a command that must end with ``code``."""
        process = self.start(*words)
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == code, f"{words} ended with {process.returncode}:\n{out}{err}"
        assert "Traceback" not in err
        return out if code == 0 else err

    def json(self, *words: str | Path) -> Any:
        return json.loads(self.run(*words, "--json"))


def templates(launch: psutil.Process) -> list[psutil.Process]:
    """The process that forks workers for a launch, if there is one yet."""
    return [child for child in launch.children() if "worker" in child.cmdline()]


def workers_of(launch: psutil.Process) -> list[psutil.Process]:
    """The workers of a launch that live."""
    found = templates(launch)
    if forks.POSSIBLE:
        found = [worker for template in found for worker in template.children()]
    return [worker for worker in found if worker.status() != psutil.STATUS_ZOMBIE]


def _home(folder: Path) -> Sweeper:
    folder.mkdir()
    return Sweeper(folder)


@pytest.fixture
def sweeper(tmp_path: Path) -> Sweeper:
    """An empty folder to work in."""
    return _home(tmp_path / "my sweeps")


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweeper, dict[str, Any]]:
    """A study that was launched to its end, and what ``launch --json`` printed."""
    sweeper = _home(tmp_path_factory.mktemp("launched") / "my sweeps")
    return sweeper, sweeper.json("launch", sweeper.write(), "--workers", "2")


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a study file as it is given."""

    def write(text: str) -> Path:
        file = tmp_path / "broken.yaml"
        file.write_text(text)
        return file

    return write

"""What a launcher is: it starts processes, not pickles.

N copies of one command line, with G GPUs each. The trials stay in the store, so losing any of the
processes loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to start: a command line, its environment beside the launcher's own, GPUs a copy."""

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    gpus: float = 1.0
    logs: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One copy of a job. ``exit_code`` is None while it lives, ``-N`` after signal N."""

    name: str
    pid: int | None
    device: str
    exit_code: int | None
    lived_s: float
    log: Path


class Launcher(Protocol):
    """Starts, lists and stops workers."""

    def start(self, job: Job, count: int) -> list[Process]:
        """Start ``count`` more copies of ``job``."""

    def processes(self) -> list[Process]:
        """Every copy that was started, in order, dead ones included."""

    def log(self, name: str, lines: int = 20) -> str:
        """The last lines that the copy called ``name`` wrote."""

    def stop(self, *, now: bool = False) -> None:
        """Ask every copy to end (TERM), or end it (KILL). Returns at once where ``now`` is off."""


def tail(file: Path, lines: int) -> str:
    """The last ``lines`` lines of a text file, or nothing where it is not there."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 400 * lines))
            return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""

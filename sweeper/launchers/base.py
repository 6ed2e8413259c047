"""What a launcher is: it starts processes, not pickles.

N copies of one command line, with G GPUs each, here or on the machines of a cluster. The trials
stay in the store, so losing any of the processes loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from sweeper.study.spec import Resources

PYTHON: Final = "{python}"
"""As the first word of a command line: the Python of the place where the copy runs."""

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Set to one for copies without a GPU: each has one core (design decision 8)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What one launcher's copies belong to.

    ``name`` is unique among all studies of all stores, and made of letters, digits, ``.``, ``_``
    and ``-``: a cluster finds the copies of an earlier launch by it. ``grace_s``: a copy that is
    told to end needs so long. ``detached``: they are to outlive this process.
    """

    name: str
    logs: Path
    resources: Resources
    grace_s: float = 30.0
    detached: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to start: a command line, its environment beside the launcher's own, GPUs a copy.

    The environment may hold passwords, so it is not shown.

    ``logs`` is the folder that the copies write their output into, each on its own machine.
    ``forks``: the command calls `sweeper.launchers.forks.fork_as_asked`, so that copies on one
    machine may be forks of one process.
    """

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    gpus: float = 1.0
    logs: Path
    forks: bool = False

    def command(self, python: str) -> list[str]:
        """The command line where ``python`` is the interpreter."""
        return [python if self.argv[0] == PYTHON else self.argv[0], *self.argv[1:]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One copy of a job.

    ``name`` is what the copy finds in ``SWEEPER_WORKER``; no two that ever ran share one.
    ``exit_code`` is None while it lives or waits for a place in the cluster, ``-N`` after signal N.
    ``pid`` is None where nobody knows it, ``host`` is empty for this machine, and ``log`` says
    where the output is, for people.
    """

    name: str
    pid: int | None
    device: str
    exit_code: int | None
    lived_s: float
    log: str
    host: str = ""


class Launcher(Protocol):
    """Starts, lists and stops workers.

    ``elsewhere``: copies may run on machines that see neither this one's files nor its loopback
    address. Such a launcher may keep copies that an earlier launch of the same group started, and
    may itself start a copy again that died, under a new name.
    """

    @property
    def name(self) -> str:
        """What ``--launcher`` calls it."""

    @property
    def elsewhere(self) -> bool: ...

    def fitting(self, gpus: float) -> int:
        """How many copies with ``gpus`` GPUs each there is room for; at least one."""

    def start(self, job: Job, count: int) -> list[Process]:
        """Start ``count`` more copies of ``job``."""

    def processes(self) -> list[Process]:
        """Every copy, in order, those included that died since this launcher was made."""

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

"""What a study file says about the cluster that its workers run on."""

from __future__ import annotations

import math
from typing import Annotated, Final

from pydantic import AfterValidator, Field, StringConstraints

from sweeper.config.base import Section

SLURM_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._,@+-]*$"
SLURM_TIME: Final = r"^([0-9]+-[0-9]{1,2}(:[0-9]{2}){0,2}|[0-9]+:[0-9]{2}:[0-9]{2})$"
SLURM_FLAG: Final = r"^--[a-z][a-z-]*(=[^\x00-\x1f\x7f]+)?$"
SHELL_LINE: Final = r"^[^\x00-\x08\x0a-\x1f\x7f]+$"

LEAD_S: Final = 20
"""What a job needs beside the worker's grace: to be signalled, and to be queued again."""

_OURS: Final = {
    **dict.fromkeys(
        ("array", "error", "export", "export-file", "job-name", "no-requeue", "nodes", "ntasks"),
        "is set by the launcher",
    ),
    **dict.fromkeys(
        ("open-mode", "output", "parsable", "requeue", "signal", "test-only", "wait", "wrap"),
        "is set by the launcher",
    ),
    **dict.fromkeys(
        ("gres", "gpus", "gpus-per-node", "gpus-per-task"),
        "follows from resources.gpus_per_worker",
    ),
    "account": "has a field of its own: account",
    "cpus-per-task": "has a field of its own: cpus",
    "mem": "has a field of its own: memory_gib",
    "partition": "has a field of its own: partition",
    "qos": "has a field of its own: qos",
    "time": "has a field of its own: time",
}
"""Options of sbatch that ``flags`` must not repeat, and why."""


def _flag(value: str) -> str:
    name = value.removeprefix("--").partition("=")[0]
    for ours, reason in _OURS.items():  # sbatch takes any option shortened
        if name == ours or (len(name) > 2 and ours.startswith(name)):
            raise ValueError(f"must be an option that nothing else sets, but --{ours} {reason}")
    return value


_Name = Annotated[str, StringConstraints(pattern=SLURM_NAME)]
_Flag = Annotated[str, StringConstraints(pattern=SLURM_FLAG), AfterValidator(_flag)]
_Line = Annotated[str, StringConstraints(pattern=SHELL_LINE)]
_Minutes = Annotated[int, Field(ge=1)]


class Slurm(Section):
    """What `--launcher slurm` asks the cluster for, a worker each; what is left out is up to it.

    ``partition``, ``account`` and ``qos`` are the cluster's names. ``time`` is the limit of one
    job, in minutes or as `hours:minutes:seconds` or `days-hours`: a worker that reaches it resumes
    in a new one. ``cpus`` and ``memory_gib`` are what a worker gets. ``gpu_type`` is the cluster's
    name of a kind of GPU. ``shards_per_gpu`` says into how many shards the cluster divides a GPU;
    workers that share one need it. ``setup`` are lines of shell that run before a worker starts.
    ``flags`` are further options of sbatch, such as `--constraint=a100`.
    """

    partition: _Name | None = None
    account: _Name | None = None
    qos: _Name | None = None
    time: _Minutes | Annotated[str, StringConstraints(pattern=SLURM_TIME)] | None = None
    cpus: int = Field(default=1, ge=1)
    memory_gib: int | None = Field(default=None, ge=1)
    gpu_type: _Name | None = None
    shards_per_gpu: int | None = Field(default=None, ge=1)
    setup: Annotated[tuple[_Line, ...], Field(strict=False)] = ()
    flags: Annotated[tuple[_Flag, ...], Field(strict=False)] = ()

    @property
    def limit_s(self) -> int | None:
        """The time limit in seconds, None where the cluster sets it."""
        if self.time is None or isinstance(self.time, int):
            return self.time and 60 * self.time
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return (24 * int(days or 0) + hours) * 3600 + minutes * 60 + seconds


def lead_s(grace_s: float) -> int:
    """So many seconds before its time limit a worker with ``grace_s`` to leave is told to."""
    return math.ceil(grace_s) + LEAD_S

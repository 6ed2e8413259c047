"""SLURM's own programs: what they are asked, what they answer, what their errors mean.

They all talk to one daemon that may be busy or away, so that every call has a time limit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sweeper.errors import OutOfReachError, UsageError

TIMEOUT_S: Final = 60.0
"""The programs themselves give up after some tens of seconds where the daemon does not answer."""

_UNREACHED: Final = re.compile(
    r"unable to contact|timed out|connection refused|zero bytes|communication connection|"
    r"munge|unable to establish|configuration source|slurm backup controller",
    re.IGNORECASE,
)
_SEPARATOR: Final = "\t"
_ENDS: Final = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED"),
        *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
    }
)
_WAITS: Final = frozenset(
    {
        *("CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
        *("RESV_DEL_HOLD", "SPECIAL_EXIT"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One job of an array, as squeue lists it. ``reason`` is why it waits."""

    array: int
    index: int
    state: str
    reason: str
    node: str

    @property
    def running(self) -> bool:
        return self.state == "RUNNING"

    @property
    def over(self) -> bool:
        """Whether it has ended and will not run again."""
        return self.state in _ENDS

    @property
    def begun(self) -> bool:
        """Whether its script may be there now: it runs, is suspended, or has its time to end."""
        return not self.over and self.state not in _WAITS


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What is free on one node; ``gpus`` and ``shards`` as its generic resources are counted."""

    cpus: int
    gpus: int
    shards: int


def present() -> None:
    """Raise UsageError where SLURM's programs are not on the PATH."""
    missing = [name for name in ("sbatch", "squeue", "scancel", "sinfo") if not shutil.which(name)]
    if missing:
        raise UsageError(
            "SLURM's programs must be on the PATH for --launcher slurm, but "
            f"{', '.join(missing)} cannot be found; launch from a login node of the cluster, "
            "where `sinfo` lists its partitions"
        )


def submit(script: str, environment: Mapping[str, str]) -> int:
    """Hand ``script`` to sbatch in ``environment`` and give the number of its array."""
    answer = _call(["sbatch", "--parsable"], script=script, environment=environment)
    found = re.search(r"^(\d+)(;|$)", answer, re.MULTILINE)
    if found is None:
        raise OutOfReachError(f"sbatch must answer with a job's number, but said {answer!r}")
    return int(found[1])


def tasks(name: str) -> list[Task]:
    """This user's jobs called ``name``; those that ended as long as SLURM lists them."""
    layout = _SEPARATOR.join(("%F", "%K", "%T", "%r", "%N"))
    user = str(os.getuid())
    which = [f"--user={user}", f"--name={name}", "--states=all"]
    answer = _call(["squeue", "--noheader", "--array", *which, "--format", layout])
    rows = (line.split(_SEPARATOR) for line in answer.splitlines())
    return [
        Task(array=int(array), index=int(index), state=state, reason=reason, node=node)
        for array, index, state, reason, node in rows
        if index.isdigit()
    ]


def cancel(found: Sequence[Task]) -> None:
    """End jobs as the cluster does it: TERM, and KILL after its KillWait. Waiting ones are gone."""
    _scancel([], found)


def send(found: Sequence[Task], signal: str, *, script_only: bool = False) -> None:
    """Send ``signal`` to all processes of running jobs, or to their scripts only."""
    _scancel([f"--signal={signal}", "--batch" if script_only else "--full"], found)


def _scancel(options: Sequence[str], found: Sequence[Task]) -> None:
    if not found:
        return
    names = [f"{task.array}_{task.index}" for task in found]
    try:
        _call(["scancel", "--quiet", *options, *names])
    except UsageError:  # one that has ended meanwhile is no mistake; squeue shows the others
        return


def free(partition: str | None) -> list[Node]:
    """What is free on each node in use of ``partition``, a list of names, or of the default one."""
    layout = "NodeList:|,Partition:|,StateCompact:|,CPUsState:|,Gres:|,GresUsed:"
    options = [f"--partition={partition}"] if partition else []
    answer = _call(["sinfo", "--noheader", "--Node", *options, "--Format", layout])
    rows = [[word.strip() for word in line.split("|")] for line in answer.splitlines()]
    nodes = {}
    for node, name, state, cpus, gres, used in (row for row in rows if len(row) == 6):
        if state in {"idle", "mix"} and (partition or name.endswith("*")):
            nodes[node] = Node(
                cpus=int(cpus.split("/")[1]),
                gpus=_count(gres, "gpu") - _count(used, "gpu"),
                shards=_count(gres, "shard") - _count(used, "shard"),
            )
    return list(nodes.values())


def _count(gres: str, kind: str) -> int:
    """How many of ``kind`` are in ``gpu:a100:4(S:0-1),shard:8``."""
    plain = re.sub(r"\([^)]*\)", "", gres)
    found = (re.fullmatch(rf"{kind}(:[^:]+)?:(\d+)", part) for part in plain.split(","))
    return sum(int(match[2]) for match in found if match)


def _call(
    argv: Sequence[str], *, script: str = "", environment: Mapping[str, str] | None = None
) -> str:
    """What a program of SLURM's writes to stdout.

    Raises OutOfReachError where the cluster does not answer, UsageError where it refuses.
    """
    if environment is None:
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SQUEUE_", "SINFO_", "SCANCEL_"))
        }
    try:
        done = subprocess.run(
            argv,
            input=script,
            env=dict(environment),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        present()
        raise OutOfReachError(f"{argv[0]} could not be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise OutOfReachError(
            f"SLURM must answer {argv[0]} within {TIMEOUT_S:.0f} s, but did not; "
            "ask `scontrol ping` whether its controller is up"
        ) from error
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if _UNREACHED.search(said):
        raise OutOfReachError(f"SLURM's controller must answer {argv[0]}, but: {said}")
    raise UsageError(
        f"SLURM must accept what {argv[0]} is asked, but: {said}\n"
        "What is asked for stands in the study file under resources: gpus_per_worker and slurm"
    )

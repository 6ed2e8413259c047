"""Workers on a SLURM cluster: one job array of sbatch, and what squeue and its files say of it.

::

    sbatch ──► job of the array ──► worker ──► worker … (restarted where one dies)
                 │  ▲
                 │  └ time limit near, preemption, node failure: requeued, goes on from checkpoints
                 └ slurm-JOB-INDEX.lives   a line when a worker starts, one when it ends
                   slurm-JOB-INDEX.log     what it writes

Both files are in the logs of the home folder, which the nodes must share with this machine, as
they share the Python that runs here. Nothing has to be installed on the cluster.

The store's address may hold a password. It reaches the workers in the environment of sbatch, as
SLURM hands it on: it is in no script, no command line and nothing that `scontrol show job` says.
SLURM's administrators can read it; a password file (``PGPASSFILE``) keeps it from them too.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined

from sweeper.errors import OutOfReachError, UsageError
from sweeper.launchers import slurm_programs as programs
from sweeper.launchers.base import Group, Job, Process, tail
from sweeper.launchers.slurm_lives import lives_of
from sweeper.launchers.slurm_programs import Task
from sweeper.study.cluster import LEAD_S, lead_s

_log = logging.getLogger(__name__)

_LOOK_S: Final = 5.0
_GONE_S: Final = 60.0
_QUICK_S: Final = 20
_DEATHS: Final = 5
_SUBMITTED: Final = re.compile(r"slurm-(\d+)-(\d+)-\d+")

_SET_HERE: Final = frozenset(
    f"SBATCH_{name}"
    for name in (
        *("ARRAY_INX", "CPUS_PER_TASK", "ERROR", "EXPORT", "GPUS", "GPUS_PER_NODE"),
        *("GPUS_PER_TASK", "GRES", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "REQUEUE"),
        *("SIGNAL", "WAIT"),
    )
)
_SET_BY_FIELD: Final = {
    "partition": "SBATCH_PARTITION",
    "account": "SBATCH_ACCOUNT",
    "qos": "SBATCH_QOS",
    "time": "SBATCH_TIMELIMIT",
    "memory_gib": "SBATCH_MEM_PER_NODE",
}
"""Variables that would override what the script says."""


class SlurmLauncher:
    """Starts workers as jobs of a SLURM cluster; jobs of an earlier launch of the group count too.

    ``look_s``: what squeue and the files say is looked at so often, at most.
    """

    name = "slurm"
    elsewhere = True

    def __init__(self, group: Group, *, look_s: float = _LOOK_S) -> None:
        """Raises UsageError where SLURM's programs are not here."""
        programs.present()
        self._group = group
        self._look_s = look_s
        self._looked: float | None = None
        self._tasks: dict[tuple[int, int], Task] = {}
        self._arrays: dict[tuple[int, int], float] = {}
        self._buried: set[str] | None = None
        self._away = False
        self._found: list[Process] = []

    def fitting(self, gpus: float) -> int:
        """As many as there is room for now, GPUs and cores both; at least one."""
        wanted = self._group.resources.slurm
        total = 0
        for node in programs.free(wanted.partition):
            room = [node.cpus // wanted.cpus]
            if gpus and float(gpus).is_integer():
                room.append(node.gpus // int(gpus))
            elif gpus:
                room.append(node.shards // _shards(gpus, wanted.shards_per_gpu))
            total += min(room)
        return max(1, total)

    def start(self, job: Job, count: int) -> list[Process]:
        """Submit an array of ``count`` jobs, a worker each.

        Raises:
            UsageError: SLURM refuses what is asked for.
            OutOfReachError: SLURM does not answer.
        """
        job.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        script = batch_script(self._group, job, count)
        file = job.logs / f"{self._group.name}.sbatch"
        file.touch(mode=0o600)
        file.write_text(script, encoding="utf-8")
        self.processes()
        array = programs.submit(script, self._environment(job))
        now = time.time()
        self._arrays |= {(array, index): now for index in range(count)}
        self._looked = None
        return [each for each in self.processes() if each.name.startswith(f"slurm-{array}-")]

    def _environment(self, job: Job) -> dict[str, str]:
        """This process's environment and the job's, without what a job of SLURM's own has set."""
        slurm = self._group.resources.slurm
        by_field = {
            variable for name, variable in _SET_BY_FIELD.items() if getattr(slurm, name) is not None
        }
        return {
            key: value
            for key, value in {**os.environ, **job.environment}.items()
            if key not in _SET_HERE | by_field | {"CUDA_VISIBLE_DEVICES"}
            and (not key.startswith("SLURM_") or key == "SLURM_CONF")
        }

    def processes(self) -> list[Process]:
        """Every worker: those that live, those that wait for a place, and those that died.

        Where SLURM does not answer, they are as they were.
        """
        if self._looked is None or time.monotonic() - self._looked > self._look_s:
            self._look()
        return list(self._found)

    def _look(self) -> None:
        try:
            listed = {(task.array, task.index): task for task in programs.tasks(self._group.name)}
        except OutOfReachError as error:
            if self._looked is None and not self._arrays:
                raise
            if not self._away:
                _log.warning("workers are taken to live on as they did: %s", error)
            self._away = True
            listed = self._tasks
        else:
            self._away = False
        ended = {key: task for key, task in self._tasks.items() if task.over}
        self._tasks = ended | listed  # squeue forgets those that ended after some minutes
        for key in self._tasks:
            self._arrays.setdefault(key, time.time())
        self._found = [
            process
            for (array, index), since in sorted(self._arrays.items())
            for process in self._processes_of(array, index, since)
        ]
        if self._buried is None:  # who died before this launcher was made is nobody's concern
            self._buried = {each.name for each in self._found if each.exit_code is not None}
        self._found = [each for each in self._found if each.name not in self._buried]
        self._looked = time.monotonic()

    def _processes_of(self, array: int, index: int, since: float) -> Iterable[Process]:
        lives = lives_of(self._file(array, index, "lives"))
        task = self._tasks.get((array, index))
        log = str(self._file(array, index, "log"))
        begun = task is not None and task.begun
        goes_on = task is not None and not task.over
        for life in lives.begun:
            code = life.exit_code
            if code is None and (life is not lives.begun[-1] or not begun):
                code = -9  # nobody was left to write down how it ended
            until = life.ended_s or time.time()
            yield Process(
                name=life.name,
                pid=life.pid,
                device=life.device,
                exit_code=code,
                lived_s=max(0.0, until - life.began_s),
                log=log,
                host=life.host,
            )
        if begun and (lives.living or lives.over):
            return
        if goes_on or not lives.begun:
            failed = task is not None and task.state == "FAILED"  # its script did not even begin
            yield Process(
                name=f"slurm-{array}-{index}-{len(lives.begun)}",
                pid=None,
                device=_place(task),
                exit_code=None if goes_on else 1 if failed else -signal.SIGTERM,
                lived_s=0.0 if goes_on or failed else time.time() - since,
                log=log,
                host=task.node if task else "",
            )

    def _file(self, array: int, index: int, kind: str) -> Path:
        return self._group.logs / f"slurm-{array}-{index}.{kind}"

    def log(self, name: str, lines: int = 20) -> str:
        """The last lines of a worker's job; why there is none, where there is none."""
        found = _SUBMITTED.fullmatch(name)
        if found is None:
            return ""
        file = self._file(int(found[1]), int(found[2]), "log")
        return tail(file, lines) or (
            f"nothing is in {file}; that folder must be on a file system that the nodes share "
            "(choose another with --home), and the job must have begun"
        )

    def stop(self, *, now: bool = False) -> None:
        """Ask every worker to end (TERM), or end it (KILL) and wait until none is left.

        Jobs that wait for a place are withdrawn. KILL is the script's part: by itself SLURM gives
        a job the time that its KillWait says.
        """
        self._looked = None
        found = self._going_on()
        running = [task for task in found if task.running]
        programs.cancel([task for task in found if not task.running])
        if not now:
            programs.send(running, "TERM")
            return
        programs.send(running, "USR2", script_only=True)
        until = time.monotonic() + _GONE_S
        while time.monotonic() < until and any(e.exit_code is None for e in self.processes()):
            time.sleep(min(1.0, self._look_s))
            self._looked = None
        programs.cancel(self._going_on())

    def _going_on(self) -> list[Task]:
        return [task for task in programs.tasks(self._group.name) if not task.over]


def _place(task: Task | None) -> str:
    """Why a job without a worker has none."""
    if task is None:
        return ""
    return f"waits: {task.reason}" if task.state == "PENDING" else task.state.lower()


def batch_script(group: Group, job: Job, count: int) -> str:
    """What is handed to sbatch.

    Raises UsageError where the log folder's name is one that SLURM cannot write to, or where
    workers are to share a GPU in a cluster that is not known to divide them.
    """
    folder = str(job.logs)
    if re.search(r"[\x00-\x1f\x7f\\]", folder):
        raise UsageError(
            "the folder of the logs must have no control character and no backslash in its name "
            f"for --launcher slurm, but is {folder!r}; choose another with --home"
        )
    slurm = group.resources.slurm
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"shell": _shell, "sbatch": _sbatch}
    source = resources.files("sweeper.launchers").joinpath("slurm.sh.j2").read_text("utf-8")
    return environment.from_string(source).render(
        name=group.name,
        count=count,
        cpus=slurm.cpus,
        flags=[*_flags(group, job.gpus), *slurm.flags],
        gpus=job.gpus,
        output=folder.replace("%", "%%") + "/slurm-%A-%a.log",
        logs=folder,
        lead_s=lead_s(group.grace_s),
        patience_s=math.ceil(group.grace_s) + LEAD_S // 2,
        setup=slurm.setup,
        command=job.command(sys.executable),
        quick_s=_QUICK_S,
        deaths=_DEATHS,
    )


def _flags(group: Group, gpus: float) -> list[str]:
    """The options of sbatch that follow from ``resources``."""
    slurm = group.resources.slurm
    fields: Mapping[str, object | None] = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "mem": slurm.memory_gib and f"{slurm.memory_gib}G",
        "gres": _gres(gpus, slurm.gpu_type, slurm.shards_per_gpu),
    }
    return [f"--{name}={value}" for name, value in fields.items() if value is not None]


def _gres(gpus: float, kind: str | None, shards_per_gpu: int | None) -> str | None:
    if not gpus:
        return None
    if float(gpus).is_integer():
        return ":".join(filter(None, ("gpu", kind, str(int(gpus)))))
    return f"shard:{_shards(gpus, shards_per_gpu)}"


def _shards(gpus: float, shards_per_gpu: int | None) -> int:
    if gpus > 1:
        raise UsageError(
            "resources.gpus_per_worker must be a whole number or below 1 for --launcher slurm, "
            f"but is {gpus:g}"
        )
    if shards_per_gpu is None:
        raise UsageError(
            "workers that share a GPU need a cluster that divides GPUs into shards, and the study "
            f"file must say into how many, but gpus_per_worker is {gpus:g} and "
            "resources.slurm.shards_per_gpu is not set; "
            "`scontrol show node` lists gres/shard where there are any"
        )
    return math.ceil(gpus * shards_per_gpu)


def _shell(value: object) -> str:
    return shlex.quote(str(value))


def _sbatch(value: str) -> str:
    """``value`` as it is to stand behind ``#SBATCH``: sbatch takes off quotes and backslashes."""
    if re.fullmatch(r"[\w./:=,@%+-]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'

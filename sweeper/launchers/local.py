"""Workers on this machine: one a GPU, or one-thread processes on the cores (design decision 8)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sweeper.launchers import forks
from sweeper.launchers.base import THREAD_VARIABLES, Group, Job, Process, tail
from sweeper.private import private_folder, private_opener
from sweeper.settings import WORKER_VARIABLE, local_worker_name


@cache
def gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in {"", "-1"})
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        listed = subprocess.run(
            [program, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in listed.stdout.splitlines() if line.strip())


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def automatic_workers(gpus_per_worker: float) -> int:
    """How many workers fit this machine: as the GPUs allow, or one a core without any."""
    if found := len(gpus()):
        return max(1, int(found / gpus_per_worker)) if gpus_per_worker else cores()
    return cores()


def devices(index: int, gpus_per_worker: float) -> str:
    """``CUDA_VISIBLE_DEVICES`` of the ``index``-th worker, or nothing for a worker on the CPU.

    Workers are dealt round: with half a GPU each, two share one; with more workers than GPUs
    they share as well.
    """
    found = gpus()
    if not found or not gpus_per_worker:
        return ""
    if gpus_per_worker < 1:
        return found[int(index * gpus_per_worker) % len(found)]
    count = round(gpus_per_worker)
    first = index * count
    return ",".join(found[(first + offset) % len(found)] for offset in range(count))


@dataclass(kw_only=True)
class _Child:
    name: str
    device: str
    slot: int
    process: subprocess.Popen[bytes] | forks.Fork
    log: Path
    started: float
    ended: float | None = None


def _environment(job: Job, device: str) -> dict[str, str]:
    """The environment of a copy: one thread where it has a core and no GPU."""
    environment = {**os.environ, **job.environment, "CUDA_VISIBLE_DEVICES": device}
    if not device:
        for variable in THREAD_VARIABLES:
            environment.setdefault(variable, "1")
    return environment


class LocalLauncher:
    """Starts workers as processes, each in a session of its own.

    A terminal's Ctrl-C therefore reaches the controller only, which asks the workers to end. Those
    on a CPU are forks of one process where that is possible (`sweeper.launchers.forks`).
    """

    name = "local"
    elsewhere = False

    def __init__(self, group: Group | None = None) -> None:
        """``group`` is of no use here: nothing outlives this process."""
        self._children: list[_Child] = []
        self._templates: list[tuple[Job, forks.Template]] = []

    def fitting(self, gpus: float) -> int:
        """As many as the GPUs allow, or one a core without any."""
        return automatic_workers(gpus)

    def start(self, job: Job, count: int) -> list[Process]:
        """Start ``count`` workers on the devices that no living worker holds."""
        taken = {child.slot for child in self._children if child.process.poll() is None}
        free = (slot for slot in range(len(taken) + count) if slot not in taken)
        private_folder(job.logs)
        return [
            self._process(self._start_one(job, slot))
            for slot, _ in zip(free, range(count), strict=False)
        ]

    def _start_one(self, job: Job, slot: int) -> _Child:
        name = local_worker_name(len(self._children))
        device = devices(slot, job.gpus)
        log = job.logs / f"{name}.log"
        process = (
            self._forked(job, name, log)
            if job.forks and forks.POSSIBLE and not device
            else self._spawned(job, name, log, device)
        )
        child = _Child(
            name=name, device=device, slot=slot, process=process, log=log, started=time.monotonic()
        )
        self._children.append(child)
        return child

    def _forked(self, job: Job, name: str, log: Path) -> forks.Fork:
        """A fork of a template for this job. What keeps that from working is in the first's log."""
        made_for, template = self._templates[-1] if self._templates else (None, None)
        if template is None or made_for != job or not template.usable:
            command, environment = job.command(sys.executable), _environment(job, device="")
            template = forks.Template(command=command, environment=environment, log=log)
            self._templates.append((job, template))
        return template.fork(name, log)

    def _spawned(self, job: Job, name: str, log: Path, device: str) -> subprocess.Popen[bytes]:
        with open(log, "ab", opener=private_opener) as stream:
            return subprocess.Popen(
                job.command(sys.executable),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**_environment(job, device), WORKER_VARIABLE: name},
                start_new_session=True,
            )

    def _process(self, child: _Child) -> Process:
        code = child.process.poll()
        if code is not None and child.ended is None:
            child.ended = time.monotonic()
        return Process(
            name=child.name,
            pid=child.process.pid,
            device=child.device or "cpu",
            exit_code=code,
            lived_s=(child.ended or time.monotonic()) - child.started,
            log=str(child.log),
        )

    def processes(self) -> list[Process]:
        """Every worker that was started, dead ones included."""
        return [self._process(child) for child in self._children]

    def log(self, name: str, lines: int = 20) -> str:
        """The last lines of a worker's log."""
        return next((tail(child.log, lines) for child in self._children if child.name == name), "")

    def stop(self, *, now: bool = False) -> None:
        """TERM to every living worker, or KILL and wait until none is left."""
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGKILL if now else signal.SIGTERM)
        if now:
            for child in self._children:
                child.process.wait()
            while self._templates:
                self._templates.pop()[1].close()

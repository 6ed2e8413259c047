"""A SLURM cluster of this machine's own: two nodes with two GPUs each, none of them real.

Debian's slurm-wlm and munge, as root and without systemd. Everything lies in one temporary folder
and ends with the cluster: daemons by their process id, jobs before them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
NODES = ("n1", "n2")
GPUS = 2
SHARDS = 8


def missing() -> str:
    """Why no cluster can be started here; nothing where one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root here"


def until(condition: Callable[[], bool], timeout_s: float = 60, every_s: float = 0.2) -> None:
    """Wait for ``condition``."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(every_s)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class SlurmCluster:
    """Two nodes and the partitions ``low``, the default one, and ``high``, which preempts it.

    ``requeue_s``: a job that was queued again waits so long. SLURM's own default is
    120, which it also takes for less than 5.
    """

    def __init__(self, *, requeue_s: int = 5, kill_wait_s: int = 20) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge's socket needs a short name
        self.folder.chmod(0o755)
        self.conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._configure(requeue_s, kill_wait_s)

    def _configure(self, requeue_s: int, kill_wait_s: int) -> None:
        folder, host = self.folder, socket.gethostname()
        controller, *ports = _free_ports(1 + len(NODES))
        for name in ("state", "munge", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(256))
        key.chmod(0o400)
        resources = f"Gres=gpu:{GPUS},shard:{SHARDS}"
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            *("SlurmUser=root", "SlurmdUser=root", "AuthType=auth/munge"),
            f"AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_s}",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/%n.pid",
            *("SlurmdParameters=config_overrides", "ProctrackType=proctrack/linuxproc"),
            *("TaskPlugin=task/none", "MpiDefault=none", "SwitchType=switch/none"),
            *("SelectType=select/cons_tres", "SelectTypeParameters=CR_Core"),
            *("ReturnToService=2", f"KillWait={kill_wait_s}", "GresTypes=gpu,shard"),
            *("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"),
            "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 "
                f"RealMemory=4000 {resources}"
                for node, port in zip(NODES, ports, strict=True)
            ),
            "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        for node in NODES:
            for gpu in range(GPUS):  # /dev/null by another name: a count alone is no GPU
                os.mknod(folder / f"{node}-gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (folder / "gres.conf").write_text(
            "".join(
                f"NodeName={node} Name=gpu File={folder}/{node}-gpu[0-{GPUS - 1}]\n"
                f"NodeName={node} Name=shard Count={SHARDS}\n"
                for node in NODES
            )
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def start(self) -> None:
        """Start the daemons; both nodes are idle when this returns."""
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        until(lambda: (munge / "socket").exists())
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        try:
            until(self._idle)
        except TimeoutError as error:
            logs = {file.name: file.read_text()[-2000:] for file in self.folder.glob("*.out")}
            raise RuntimeError(f"the cluster did not come up: {logs}") from error

    def _daemon(self, *argv: str) -> None:
        with (self.folder / f"{argv[0]}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self.environment},
                    start_new_session=True,
                )
            )

    def _idle(self) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            return self.run("sinfo", "-h", "-p", "low", "-o", "%D %t").split() == ["2", "idle"]
        return False

    def run(self, *argv: str | Path, timeout_s: float = 20) -> str:
        """What one of SLURM's programs prints."""
        done = subprocess.run(
            [str(word) for word in argv],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        return done.stdout

    def states(self, name: str) -> list[str]:
        """``JOB_INDEX STATE NODE`` of each job called ``name`` that has not ended."""
        listed = self.run("squeue", "-h", "-r", f"--name={name}", "-o", "%F_%K %T %N")
        return [line.strip() for line in listed.splitlines()]

    def restarts(self, job: str) -> int:
        """How often a job (``JOB_INDEX``) was queued again."""
        found = re.search(r"Restarts=(\d+)", self.run("scontrol", "show", "job", job))
        return int(found[1]) if found else 0

    def runs_s(self, job: str) -> int:
        """For how long a job (``JOB_INDEX``) has been running."""
        found = re.search(r"RunTime=(\d+):(\d+):(\d+)", self.run("scontrol", "show", "job", job))
        if found is None:
            raise ValueError(f"{job} does not run")
        hours, minutes, seconds = map(int, found.groups())
        return (60 * hours + minutes) * 60 + seconds

    def preempt(self, node: str, seconds: float = 1) -> None:
        """Take ``node`` for a while for a job that preempts those of the partition ``low``."""
        options = ("--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null")
        self.run("sbatch", "--job-name=preempts", *options, f"--wrap=sleep {seconds}")

    def close(self) -> None:
        """End all jobs, then the daemons."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", "--signal=KILL", "--user=root")
            self.run("scancel", "--user=root")
            until(lambda: not self.run("squeue", "-h"), timeout_s=10)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in _steps(self.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _steps(folder: Path) -> Sequence[psutil.Process]:
    """What is left of the cluster's jobs: a step's daemon outlives the one that started it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("slurmstepd") and (
                process.environ().get("SLURM_CONF", "").startswith(str(folder))
            ):
                found += [*process.children(recursive=True), process]
    return found


@contextlib.contextmanager
def cluster(*, requeue_s: int = 5, kill_wait_s: int = 20) -> Iterator[SlurmCluster]:
    """A cluster that is up. Skips, and says why, where none can be started."""
    if reason := missing():
        pytest.skip(reason)
    started = SlurmCluster(requeue_s=requeue_s, kill_wait_s=kill_wait_s)
    try:
        started.start()
        yield started
    finally:
        started.close()

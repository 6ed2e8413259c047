"""Jobs of a real SLURM cluster, which has two nodes with two GPUs each: see `slurm_cluster`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from launchers.slurm_cluster import SlurmCluster, until

from sweeper.errors import OutOfReachError, UsageError
from sweeper.launchers import PYTHON, Group, Job, Process, open_launcher
from sweeper.launchers import slurm_programs as programs
from sweeper.launchers.slurm import SlurmLauncher, batch_script
from sweeper.launchers.slurm_lives import lives_of
from sweeper.study.spec import Resources

COUNTS_TERM = """
import os, signal, sys, time
def received(number, frame):
    print(os.environ['SWEEPER_WORKER'], 'received', number, flush=True)
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, received)
print('here', flush=True)
time.sleep(600)
"""
ENDS_AT_ONCE = "trap 'exit 143' TERM; exec 3<> <(:); echo here; read -u 3"
SECRET = """it's "s3cr3t" 100% $HOME #1"""


@pytest.fixture
def launcher(
    slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, nasty_folder: Path
) -> Iterator[Callable[..., SlurmLauncher]]:
    """Opens launchers of one group, whose jobs end with the test."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    opened = []

    def of(**resources: Any) -> SlurmLauncher:
        group = _group(nasty_folder, **resources)
        opened.append(SlurmLauncher(group, look_s=0.1))
        return opened[-1]

    yield of
    if opened:
        opened[-1].stop(now=True)


def _group(folder: Path, **resources: Any) -> Group:
    return Group(
        name=f"tests-{os.path.basename(folder.parent)}",  # noqa: PTH119 - a name, not a path
        logs=folder,
        resources=Resources.model_validate(resources),
        grace_s=1,
    )


def _job(folder: Path, program: str = COUNTS_TERM, gpus: float = 0) -> Job:
    return Job(
        argv=[PYTHON, "-c", program], environment={"MY_SECRET": SECRET}, logs=folder, gpus=gpus
    )


def _alive(launcher: SlurmLauncher) -> list[Process]:
    return [each for each in launcher.processes() if each.exit_code is None]


def _here(launcher: SlurmLauncher, count: int = 1) -> Callable[[], bool]:
    """Whether ``count`` workers live and have begun their program."""
    return lambda: (
        len([each for each in _alive(launcher) if "here" in launcher.log(each.name)]) == count
        and all(each.pid for each in _alive(launcher))
    )


def test_workers_find_what_the_job_and_the_study_file_say(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their name, their environment with quotes in it, their GPU, lines that ran before them."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = "import os; print(*(os.environ[n] for n in {names}), sep='|', flush=True)"
    names = ("SWEEPER_WORKER", "MY_SECRET", "BEFORE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    program = said.format(names=names) + "\nprint('here')" + COUNTS_TERM
    opened = launcher(slurm={"setup": ["export BEFORE='a \"b\"'"], "cpus": 2, "time": 5})
    started = opened.start(_job(nasty_folder, program, gpus=1), 3)
    assert [each.exit_code for each in started] == [None] * 3
    until(_here(opened, 3))
    alive = _alive(opened)
    assert {each.name for each in alive} == {each.name for each in started}
    for each in alive:
        assert f'{each.name}|{SECRET}|a "b"|2|{each.device}\n' in opened.log(each.name) + "\n"
        assert Path(each.log).read_text().startswith(each.name)
    places = {(each.host, each.device) for each in alive}
    assert len(places) == 3
    assert places <= {("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1")}
    assert opened.fitting(1) == 1
    assert opened.fitting(0) == 1, "8 cores, 6 in use, two a worker"


def test_secrets_are_in_no_script_and_on_no_command_line(
    launcher: Callable[..., SlurmLauncher], slurm_cluster: SlurmCluster, nasty_folder: Path
) -> None:
    opened = launcher()
    opened.start(_job(nasty_folder), 1)
    until(_here(opened))
    name = _alive(opened)[0].name
    job = "_".join(name.split("-")[1:3])
    shown = [
        slurm_cluster.run("scontrol", "show", "job", job),
        slurm_cluster.run("scontrol", "write", "batch_script", job, "-"),
        slurm_cluster.run("squeue", "-O", "JobID,Command:500,Comment:500,WorkDir:500"),
        *(file.read_text() for file in nasty_folder.glob("*.sbatch")),
        *(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])),
    ]
    assert any("SWEEPER_WORKER" in text for text in shown)
    assert not any("s3cr3t" in text for text in shown)
    for file in nasty_folder.glob("*.sbatch"):
        assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_dies_or_that_somebody_tells_to_end_is_replaced(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path, number: signal.Signals
) -> None:
    opened = launcher()
    opened.start(_job(nasty_folder), 1)
    until(_here(opened))
    first = _alive(opened)[0]
    assert first.pid is not None
    psutil.Process(first.pid).send_signal(number)
    until(lambda: any(each.name != first.name and each.pid for each in _alive(opened)))
    dead, alive = opened.processes()
    assert (dead.name, dead.exit_code) == (first.name, -number)
    assert alive.name == first.name.removesuffix("0") + "1"


def test_a_worker_that_has_said_why_it_ends_is_not_replaced(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path
) -> None:
    """Nothing left to do, nothing that can run here, no store."""
    opened = launcher()
    for code in (0, 2, 3):
        opened.start(_job(nasty_folder, f"print('why'); raise SystemExit({code})"), 1)
    until(lambda: not _alive(opened))
    assert [each.exit_code for each in opened.processes()] == [0, 2, 3]
    assert all("why" in opened.log(each.name) for each in opened.processes())


def test_workers_that_die_at_once_are_given_up_after_five(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path
) -> None:
    opened = launcher()
    opened.start(_job(nasty_folder, "raise SystemExit(1)"), 1)
    until(lambda: not _alive(opened))
    assert [each.exit_code for each in opened.processes()] == [1] * 5
    assert len({each.name for each in opened.processes()}) == 5


def test_term_reaches_a_worker_once_and_waiting_jobs_are_withdrawn(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path
) -> None:
    opened = launcher()
    opened.start(_job(nasty_folder, gpus=2), 3)
    until(_here_beside_waiting(opened, 2, 1))
    opened.stop()
    until(lambda: not _alive(opened))
    ran = [each for each in opened.processes() if each.pid]
    assert [each.exit_code for each in ran] == [0, 0]
    for each in ran:
        assert opened.log(each.name).count("received 15") == 1
    waited = [each for each in opened.processes() if not each.pid]
    assert [each.exit_code for each in waited] == [-15]


def _here_beside_waiting(launcher: SlurmLauncher, running: int, waiting: int) -> Callable[[], bool]:
    def found() -> bool:
        alive = _alive(launcher)
        began = [each for each in alive if each.pid and "here" in launcher.log(each.name)]
        waits = [each for each in alive if not each.pid and each.device.startswith("waits: R")]
        return (len(began), len(waits)) == (running, waiting)

    return found


def test_stopping_now_ends_even_a_worker_that_does_not_listen(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path
) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True)"
    opened = launcher()
    opened.start(_job(nasty_folder, deaf + "; time.sleep(600)"), 2)
    until(_here(opened, 2))
    opened.stop(now=True)
    assert [each.exit_code for each in opened.processes()] == [-9, -9]


def test_before_the_time_limit_and_after_a_preemption_the_job_is_queued_again(
    launcher: Callable[..., SlurmLauncher], slurm_cluster: SlurmCluster, nasty_folder: Path
) -> None:
    """The worker hears TERM once, the next one in the same job has a new name."""
    opened = launcher()
    opened.start(_job(nasty_folder, gpus=2), 2)  # a node each
    until(_here(opened, 2))
    near, taken = _alive(opened)
    job = "_".join(near.name.split("-")[1:3])
    slurm_cluster.preempt(taken.host)
    until(lambda: "received 15" in opened.log(taken.name, 100))
    assert len(_alive(opened)) == 2, "a job that is queued again lives on"
    # What SLURM itself does so many seconds before the limit.
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: sorted(each.name[-2:] for each in _alive(opened) if each.pid) == ["-1", "-1"])
    until(_here(opened, 2))
    for before in (near, taken):
        found = opened.processes()
        assert next(each.exit_code for each in found if each.name == before.name) == 0
        assert opened.log(before.name, 100).count(f"{before.name} received 15") == 1
        assert before.name[:-1] + "1" in {each.name for each in found}
    assert "the time limit is near" in opened.log(near.name, 100)
    assert slurm_cluster.restarts(job) == 1


def test_a_later_launch_finds_the_workers_that_live_and_none_that_died(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path, tmp_path: Path
) -> None:
    opened = launcher()
    opened.start(_job(nasty_folder, "pass"), 1)
    until(lambda: not _alive(opened))
    opened.start(_job(nasty_folder), 1)
    until(_here(opened))
    again = launcher()
    assert [each.name for each in again.processes()] == [each.name for each in _alive(opened)]
    (tmp_path / "other").mkdir()
    other = SlurmLauncher(_group(tmp_path / "other" / "logs"), look_s=0.1)
    assert other.processes() == []
    again.stop()
    until(lambda: not _alive(again))
    assert [each.exit_code for each in again.processes()] == [0]


def test_what_slurm_refuses_is_said_in_its_words(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path
) -> None:
    with pytest.raises(UsageError, match="invalid partition specified: nowhere"):
        launcher(slurm={"partition": "nowhere"}).start(_job(nasty_folder), 1)
    with pytest.raises(UsageError, match=r"not available.*\n.*gpus_per_worker"):
        launcher().start(_job(nasty_folder, gpus=7), 1)


def test_workers_share_a_gpu_that_the_cluster_divides(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path
) -> None:
    opened = launcher(slurm={"shards_per_gpu": 4})
    assert opened.fitting(0.5) == 8
    opened.start(_job(nasty_folder, gpus=0.5), 3)
    until(_here(opened, 3))
    assert opened.fitting(0.5) == 5


def test_a_folder_that_nodes_do_not_share_is_named(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path
) -> None:
    """SLURM cannot open the log there, and the job fails before its first line."""
    opened = launcher(slurm={"flags": ["--begin=now+2"]})
    waits = opened.start(_job(nasty_folder), 1)[0]
    assert waits.exit_code is None
    nasty_folder.rename(nasty_folder.with_name("not on the nodes"))
    until(lambda: not _alive(opened))
    assert [(each.exit_code, each.lived_s) for each in opened.processes()] == [(1, 0)]
    assert "must be on a file system that the nodes share" in opened.log(waits.name)


def test_a_cluster_that_does_not_answer_is_waited_for(
    launcher: Callable[..., SlurmLauncher], nasty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = launcher()
    opened.start(_job(nasty_folder), 1)
    until(_here(opened))
    alive = _alive(opened)
    conf = Path(os.environ["SLURM_CONF"])
    away = conf.with_name("away.conf")
    away.write_text(
        re.sub("SlurmctldPort=.*", "SlurmctldPort=9\nMessageTimeout=2", conf.read_text())
    )
    monkeypatch.setenv("SLURM_CONF", str(away))
    for _ in range(2):
        opened._looked = -1e9
        assert [each.name for each in opened.processes()] == [each.name for each in alive]
    with pytest.raises(OutOfReachError, match="must answer sbatch"):
        opened.start(_job(nasty_folder), 1)
    monkeypatch.setenv("SLURM_CONF", str(conf))


def test_a_program_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "squeue", "scancel", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(programs, "TIMEOUT_S", 0.2)
    with pytest.raises(OutOfReachError, match="must answer squeue within"):
        SlurmLauncher(_group(tmp_path)).processes()


def test_without_slurm_the_message_says_where_to_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="sbatch, squeue, scancel, sinfo cannot be found"):
        open_launcher("slurm", _group(tmp_path))


def test_the_script_asks_for_what_the_study_file_says(tmp_path: Path) -> None:
    group = _group(
        tmp_path,
        slurm={
            "partition": "gpu,long",
            "account": "project",
            "qos": "normal",
            "time": "1-12",
            "cpus": 4,
            "memory_gib": 16,
            "gpu_type": "a100",
            "flags": ['--constraint=a \\ "b"', "--exclusive"],
        },
    )
    script = batch_script(group, _job(tmp_path, gpus=2), 5)
    asked = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    assert asked == [
        f"job-name={group.name}",
        *("array=0-4", "nodes=1", "ntasks=1", "cpus-per-task=4", "partition=gpu,long"),
        *("account=project", "qos=normal", "time=1-12", "mem=16G", "gres=gpu:a100:2"),
        "exclusive",
        f"output={tmp_path}/slurm-%A-%a.log",
        *("open-mode=append", "export=ALL", "requeue", "signal=B:USR1@21"),
    ]
    assert r'#SBATCH "--constraint=a \\ \"b\""' in script.splitlines()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert f"exec {sys.executable} -c " in script


def test_a_worker_that_ends_the_moment_it_is_told_to_has_ended_well(tmp_path: Path) -> None:
    """Thirty times, as bash loses the exit code of one in three."""
    job = Job(argv=["bash", "-c", ENDS_AT_ONCE], logs=tmp_path)
    script = batch_script(_group(tmp_path), job, 30)
    for index in range(30):
        names = {"ARRAY_JOB_ID": 1, "ARRAY_TASK_ID": index, "CPUS_PER_TASK": 1, "JOB_ID": 1}
        numbers = {f"SLURM_{name}": str(number) for name, number in names.items()}
        with subprocess.Popen(
            ["bash", "-c", script],
            env={**os.environ, **numbers},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == b"here\n"
            file = tmp_path / f"slurm-1-{index}.lives"
            until(lambda file=file: bool(lives_of(file).begun), every_s=0.01)
            pid = lives_of(file).begun[0].pid
            for each in (running.pid, pid):
                os.kill(each, signal.SIGTERM)
            assert running.wait(20) == 0
        (life,) = lives_of(file).begun
        assert life.exit_code == 0


@pytest.mark.parametrize(
    ("gpus", "message"),
    [(0.5, "shards_per_gpu is not set"), (1.5, "whole number or below 1")],
)
def test_gpus_that_slurm_cannot_divide_are_refused(
    tmp_path: Path, gpus: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        batch_script(_group(tmp_path), _job(tmp_path, gpus=gpus), 1)


@pytest.mark.parametrize("name", ["back\\slash", "line\nbreak"])
def test_a_folder_that_slurm_cannot_write_to_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no backslash"):
        batch_script(_group(tmp_path), _job(tmp_path / name), 1)


def test_half_a_line_of_a_file_that_is_being_written_is_none(tmp_path: Path) -> None:
    file = tmp_path / "lives"
    assert lives_of(file).begun == ()
    file.write_text("start a n1 12 0,1 100\nend a 137 105 again\nstart b n1 13 cpu 106\nend b 0 1")
    lives = lives_of(file)
    assert [(each.name, each.exit_code) for each in lives.begun] == [("a", -9), ("b", None)]
    assert lives.living
    assert not lives.over
    file.write_text(file.read_text() + "10 last\n")
    assert lives_of(file).over

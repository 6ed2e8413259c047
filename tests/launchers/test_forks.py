"""Workers that are forks of one process: what becomes of them when it is not there, or no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from launchers.test_contract import eventually as eventually_within

from sweeper.launchers import Job, LocalLauncher, Process, forks, local
from sweeper.settings import WORKER_VARIABLE

needs_pidfd = pytest.mark.skipif(
    not forks.POSSIBLE, reason="this system has no pidfd, so that nothing is forked"
)

WORKS = f"""
import os, time
from sweeper.launchers.forks import fork_as_asked
print("prepares", flush=True)
fork_as_asked(lambda: PREPARE)
print(os.getppid(), os.environ["{WORKER_VARIABLE}"], "SWEEPER_FORKS" in os.environ, flush=True)
time.sleep(600)
"""


eventually = partial(eventually_within, limit_s=30)


class Forked:
    """A launcher whose copies are forks, and what is known of them."""

    def __init__(self, folder: Path, prepare: str = "None") -> None:
        self.launcher = LocalLauncher()
        program = WORKS.replace("PREPARE", prepare)
        self.job = Job(argv=[sys.executable, "-c", program], logs=folder, gpus=0, forks=True)

    def start(self, count: int) -> list[str]:
        return [process.name for process in self.launcher.start(self.job, count)]

    def process(self, name: str) -> Process:
        return next(found for found in self.launcher.processes() if found.name == name)

    def said(self, name: str) -> list[str]:
        """The words of a copy that is there: its parent, its name, whether it is a template."""
        found = eventually(lambda: self.launcher.log(name, 1))
        return found.split() if found != "prepares" else []

    def template(self, name: str) -> psutil.Process:
        return psutil.Process(int(eventually(lambda: self.said(name))[0]))


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    local.gpus.cache_clear()


pytestmark = [needs_pidfd, pytest.mark.usefixtures("no_gpu")]


def test_copies_are_forks_of_one_process_each_in_a_session_of_its_own(tmp_path: Path) -> None:
    forked = Forked(tmp_path)
    first, second = forked.start(2)
    words = [eventually(lambda name=name: forked.said(name)) for name in (first, second)]
    assert [each[1:] for each in words] == [[first, "False"], [second, "False"]]
    assert words[0][0] == words[1][0]
    pids = [forked.process(name).pid for name in (first, second)]
    assert [os.getsid(pid) for pid in pids if pid] == pids
    (third,) = forked.start(1)
    assert forked.template(third) == forked.template(first), "a later one is of the same process"
    forked.launcher.stop(now=True)
    assert {p.exit_code for p in forked.launcher.processes()} == {-signal.SIGKILL}


def test_a_template_that_was_killed_is_replaced_and_its_forks_are_known(tmp_path: Path) -> None:
    """Forks live on until they see that they are alone; how they end then nobody can say."""
    forked = Forked(tmp_path)
    (first,) = forked.start(1)
    template = forked.template(first)
    template.kill()
    eventually(lambda: gone(template))
    (second,) = forked.start(1)
    assert forked.template(second) != template
    assert forked.process(first).exit_code is None
    os.kill(forked.process(first).pid or 0, signal.SIGTERM)
    eventually(lambda: forked.process(first).exit_code)
    assert forked.process(first).exit_code == -signal.SIGKILL
    forked.launcher.stop(now=True)


def test_what_keeps_a_template_from_its_work_is_in_the_log(tmp_path: Path) -> None:
    forked = Forked(tmp_path, prepare="__import__('no_such_package')")
    first, second = forked.start(2)
    eventually(lambda: forked.process(second).exit_code)
    assert forked.process(first).exit_code == 1
    assert "No module named 'no_such_package'" in forked.launcher.log(first)
    forked.launcher.stop(now=True)


@pytest.mark.parametrize("now", [False, True])
def test_copies_that_are_still_to_come_need_not_be_waited_for(tmp_path: Path, now: bool) -> None:
    forked = Forked(tmp_path, prepare="time.sleep(60)")
    (first,) = forked.start(1)
    eventually(lambda: forked.launcher.log(first))
    assert forked.process(first).pid is None
    began = time.monotonic()
    forked.launcher.stop(now=now)
    assert forked.process(first).exit_code == (-signal.SIGKILL if now else -signal.SIGTERM)
    assert time.monotonic() - began < 10
    forked.launcher.stop(now=True)


LAUNCHES = """
import pathlib, sys, time
from sweeper.launchers import Job, LocalLauncher
launcher, folder = LocalLauncher(), pathlib.Path(sys.argv[1])
job = Job(argv=[sys.executable, "-c", sys.argv[2]], logs=folder, gpus=0, forks=True)
(copy,) = launcher.start(job, 1)
while copy.pid is None or not launcher.log(copy.name, 1)[:1].isdigit():
    time.sleep(0.02)
    (copy,) = launcher.processes()
print(copy.pid, launcher.log(copy.name, 1), flush=True)
time.sleep(600)
"""


def test_a_template_ends_with_its_launcher(tmp_path: Path) -> None:
    """However that ended; a worker sees then that it is alone, and ends as well."""
    words = [sys.executable, "-c", LAUNCHES, str(tmp_path), WORKS.replace("PREPARE", "None")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as launching:
        said = launching.stdout.readline().split() if launching.stdout else []
        copy, template = (psutil.Process(int(word)) for word in said[:2])
        launching.kill()
    eventually(lambda: gone(template))
    eventually(lambda: copy.ppid() != template.pid)
    copy.kill()

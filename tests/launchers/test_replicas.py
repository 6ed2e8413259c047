"""Replicas are kept alive, end together, and let their words be heard."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sweeper.cli import app
from sweeper.errors import UsageError
from sweeper.launchers import Job, LocalLauncher, Process, Replicas

WAITS = "import time\nprint('here', flush=True)\ntime.sleep(600)"
HANGS_ON_ONCE = """
import signal, time
count = 0
def received(*_):
    global count
    count += 1
    print(f'signal {count}', flush=True)
    if count == 2:
        raise SystemExit(0)
signal.signal(signal.SIGTERM, received)
print('here', flush=True)
while True:
    time.sleep(0.05)
"""


class Running:
    """Replicas in a thread, and the signals that it is given."""

    def __init__(self, folder: Path, program: str, count: int) -> None:
        self.launcher = LocalLauncher()
        self.signals = 0
        job = Job(argv=[sys.executable, "-c", program], logs=folder)
        replicas = Replicas(launcher=self.launcher, job=job, count=count)
        self.done: bool | None = None

        def run() -> None:
            self.done = replicas.run(lambda: self.signals)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    @property
    def alive(self) -> list[Process]:
        return [found for found in self.launcher.processes() if found.exit_code is None]


def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)


def test_a_copy_that_is_killed_is_replaced_and_a_signal_ends_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    replicas = Running(tmp_path, WAITS, 2)
    until(lambda: len(replicas.alive) == 2)
    victim, stays = replicas.alive
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: len(replicas.launcher.processes()) == 3)
    until(lambda: all(Path(found.log).read_bytes() for found in replicas.alive))
    assert {found.name for found in replicas.alive} == {
        stays.name,
        replicas.launcher.processes()[2].name,
    }
    time.sleep(0.5)  # two looks, so that the last lines are passed on
    replicas.signals = 1
    replicas.thread.join(20)
    assert not replicas.thread.is_alive()
    assert not replicas.alive
    assert replicas.done is False
    heard = capfd.readouterr().err
    for process in replicas.launcher.processes()[1:]:
        assert f"{process.name} | here\n" in heard


def test_a_second_signal_is_passed_on(tmp_path: Path) -> None:
    replicas = Running(tmp_path, HANGS_ON_ONCE, 1)
    until(lambda: bool(replicas.launcher.processes()))
    (process,) = replicas.launcher.processes()
    until(lambda: b"here" in Path(process.log).read_bytes())
    replicas.signals = 1
    until(lambda: b"signal 1" in Path(process.log).read_bytes())
    assert replicas.thread.is_alive()
    replicas.signals = 2
    replicas.thread.join(20)
    assert not replicas.thread.is_alive()
    assert b"signal 2" in Path(process.log).read_bytes()


def test_copies_that_are_done_are_not_started_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    replicas = Running(tmp_path, "print('no newline at the end', end='')", 3)
    replicas.thread.join(30)
    assert not replicas.thread.is_alive()
    assert replicas.done is True
    assert [found.exit_code for found in replicas.launcher.processes()] == [0, 0, 0]
    assert len(re.findall(r"\| no newline at the end\n", capfd.readouterr().err)) == 3


def test_copies_that_die_at_once_are_started_ever_more_slowly(tmp_path: Path) -> None:
    began = time.monotonic()
    replicas = Running(tmp_path, "raise SystemExit(3)", 2)
    until(lambda: len(replicas.launcher.processes()) >= 6)  # after pauses of one and two seconds
    assert time.monotonic() - began > 3
    replicas.signals = 1
    replicas.thread.join(20)
    assert not replicas.thread.is_alive()


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_a_count_must_be_a_number_or_auto(count: str, tmp_path: Path) -> None:
    words = ["worker", "--count", count, "--home", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UsageError)
    assert repr(count) in str(result.exception)

"""A keeper, without any cluster: what it starts again, what it lets be, what it leaves known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sweeper.launchers import keeper as keepers
from sweeper.launchers.keeper import GONE, Keeper, Record, Run

WAITS = "import time; print('here', flush=True); time.sleep(600)"


class Kept:
    """A keeper in a thread, and every record that it published."""

    def __init__(self, folder: Path, code: str, *runs: Run) -> None:
        self.published: list[Record] = []
        blank = Record(host="here", node="n", device="cpu", logs=str(folder / "logs"), runs=runs)
        argv = [sys.executable, "-c", code, str(folder)]
        self.keeper = Keeper("study-0", argv, os.environ, blank, self.published.append)
        self.thread = threading.Thread(target=self.keeper.run, daemon=True)

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.published[-1].runs if self.published else ()

    def to_the_end(self) -> tuple[Run, ...]:
        self.thread.start()
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.runs

    def running(self, *, after: int | None = None) -> int:
        """The process id of the child, once it says that it is here; of a later one than that."""
        if not self.thread.is_alive():
            self.thread.start()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self.runs and self.keeper.log(self.runs[-1].name, 1) == "here":
                pid = self.runs[-1].pid
                if pid not in {None, after}:
                    return int(pid or 0)
            time.sleep(0.02)
        raise TimeoutError("the child never came")


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Kept]:
    """A keeper that does not pause."""
    monkeypatch.setattr(keepers, "_FIRST_PAUSE_S", 0.0)
    return lambda code, *runs: Kept(tmp_path, code, *runs)


@pytest.mark.parametrize("code", [0, 2])
def test_who_has_nothing_to_do_or_cannot_do_it_is_not_started_again(
    keep: Callable[..., Kept], code: int
) -> None:
    (run,) = keep(f"import sys; print('last words'); sys.exit({code})").to_the_end()
    assert (run.exit_code, run.said) == (code, "last words")


def test_who_dies_at_once_five_times_is_given_up(keep: Callable[..., Kept]) -> None:
    runs = keep("import os; os.kill(os.getpid(), 9)").to_the_end()
    assert [run.exit_code for run in runs] == [-signal.SIGKILL] * 5
    assert len({run.name for run in runs}) == 5


def test_a_command_that_is_not_there_is_told(keep: Callable[..., Kept], tmp_path: Path) -> None:
    kept = keep("")
    kept.keeper._argv = [str(tmp_path / "no such program")]
    runs = kept.to_the_end()
    assert {run.exit_code for run in runs} == {1}
    assert "no such program: No such file" in runs[-1].said


def test_a_log_folder_that_cannot_be_made_is_told(
    keep: Callable[..., Kept], tmp_path: Path
) -> None:
    (tmp_path / "logs").write_text("a file stands in the way")
    assert "could not be started" in keep(WAITS).to_the_end()[-1].said


def test_a_run_is_known_at_every_moment(keep: Callable[..., Kept]) -> None:
    """Between a death and the next start the next is announced: nobody starts another beside it."""
    kept = keep(WAITS)
    first = kept.running()
    os.kill(first, signal.SIGKILL)
    kept.running(after=first)
    for record in kept.published:
        assert [run.exit_code for run in record.runs].count(None) == 1
    kept.keeper.stop(now=True)
    kept.thread.join(60)
    assert kept.runs[-1].exit_code == -signal.SIGKILL


def test_runs_of_the_keeper_before_count_as_gone(keep: Callable[..., Kept]) -> None:
    """Its machine may have been lost: nobody saw them end."""
    before, done = Run(name="a", pid=1), Run(name="b", exit_code=0, lived_s=3.0)
    first, second, third = keep("", before, done).to_the_end()
    assert (first.name, first.exit_code) == ("a", GONE)
    assert second == done
    assert third.exit_code == 0


def test_a_record_survives_json() -> None:
    record = Record(host="h", node="n", device="0", logs="/l", runs=(Run(name="a", exit_code=1),))
    assert Record.of(record.public()) == record


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_the_child_is_told_to_end_when_its_keeper_dies(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from launchers.test_keeper import Kept, WAITS\n"
        "kept = Kept(Path(sys.argv[1]), WAITS)\n"
        "print(kept.running(), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    try:
        psutil.Process(int(done.stdout)).wait(timeout=30)
    except psutil.NoSuchProcess:
        return

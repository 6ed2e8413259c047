"""How a worker ends: what its exit code says to whoever keeps it alive."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from cli.conftest import Sweeper

from sweeper.store import open_store, standing, studies

EPOCHS = 10_000
"""So many that no trial ends while a test lasts."""


@pytest.fixture
def endless(sweeper: Sweeper) -> Sweeper:
    """A study whose trials are enqueued, and go on for as long as they are let."""
    file = sweeper.write(train={"epochs": EPOCHS, "batch_size": 50})
    sweeper.run("launch", "--detach", file)
    return sweeper


@contextlib.contextmanager
def started(sweeper: Sweeper, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A worker, which ends with the context."""
    process = sweeper.start("worker", "small", *words)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def eventually(condition: Callable[[], Any], timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("it did not happen")
        time.sleep(0.1)


def counts(sweeper: Sweeper) -> dict[str, int]:
    """Trials by state."""
    with contextlib.closing(open_store(f"sqlite:///{sweeper.folder}/.sweeper/optuna.db")) as store:
        return standing(store, studies.load(store, "small")).counts


def test_a_worker_that_is_told_to_end_says_so_and_one_whose_study_is_over_ends_with_0(
    endless: Sweeper,
) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with started(endless) as worker:
            eventually(lambda: counts(endless)["running"])
            worker.send_signal(number)
            _, said = worker.communicate(timeout=60)
        assert "goes back to the queue" in said
        assert worker.returncode == code, said
        assert counts(endless)["waiting"] == 3
    endless.run("stop", "small")
    endless.run("worker", "small")


def lives_alone(process: psutil.Process) -> bool:
    """Whether it is there and has no children; it may end while it is asked."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE and not process.children()
    return False


def test_one_of_several_that_somebody_else_tells_to_end_is_replaced(endless: Sweeper) -> None:
    with started(endless, "--count", "2") as parent:

        def busy() -> set[int]:
            found = psutil.Process(parent.pid).children(recursive=True)
            return {each.pid for each in found if lives_alone(each)}

        eventually(lambda: counts(endless)["running"] == 2)
        first, second = sorted(busy())
        psutil.Process(first).terminate()
        # looked at last, the trial of the one that ended is not still counted as running
        eventually(lambda: first not in (now := busy()) and len(now) == 2)
        eventually(lambda: counts(endless)["running"] == 2)
        assert second in busy()
        assert len(busy()) == 2
        parent.terminate()
        _, said = parent.communicate(timeout=60)
    assert parent.returncode == 143, said
    assert said.count("ended with 143") == 1, "those that it told to end itself are no news"
    assert counts(endless)["waiting"] == 3

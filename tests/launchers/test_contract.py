"""What every launcher does, tried on the real thing: processes, a Ray cluster, SLURM."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from launchers.conftest import Place

from sweeper.launchers import PYTHON, Job, Launcher, Process
from sweeper.settings import WORKER_VARIABLE

Found = TypeVar("Found")

NASTY = """two words, a 'quote', "another", $HOME; a%b\\n and é"""

COPY = """
if "SWEEPER_FORKS" in __import__("os").environ:
    from sweeper.launchers.forks import fork_as_asked
    fork_as_asked(lambda: None)
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
name = os.environ["SWEEPER_WORKER"]

def write(kind, text):
    file = folder / f"{name}.{kind}"
    file.with_suffix(".new").write_text(text)
    os.replace(file.with_suffix(".new"), file)

def end(*_):
    write("bye", "TERM came")
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
for line in range(30):
    print(f"line {line} of {name}", flush=True)
me = {"pid": os.getpid(), "words": sys.argv[2:], "environment": dict(os.environ)}
write("here", json.dumps(me))
if "ends" in sys.argv:
    sys.exit(0)
while True:
    time.sleep(0.05)
"""


def job(place: Place, folder: Path, *words: str, gpus: float = 0.0, **environment: str) -> Job:
    """Copies that say in ``folder`` that they are there, and end at TERM with a word."""
    folder.mkdir(exist_ok=True)
    return Job(
        argv=[PYTHON, "-c", COPY, str(folder), *words],
        environment=environment,
        gpus=gpus,
        logs=folder / "logs",
        forks=place.forks,
    )


def eventually(found: Callable[[], Found | None], limit_s: float) -> Found:
    """What ``found`` gives as soon as it gives something."""
    until = time.monotonic() + limit_s
    while not (result := found()):
        assert time.monotonic() < until, f"nothing came of it in {limit_s:.0f} s"
        time.sleep(0.1)
    return result


def said(folder: Path, kind: str = "here") -> dict[str, Any]:
    """Name → what the copies said of themselves."""
    return {file.stem: file.read_text() for file in folder.glob(f"*.{kind}")}


def alive(launcher: Launcher) -> list[Process]:
    return [process for process in launcher.processes() if process.exit_code is None]


def all_here(folder: Path, count: int, place: Place) -> dict[str, Any]:
    """What ``count`` copies say of themselves, once all have."""

    def found() -> dict[str, str] | None:
        there = said(folder)
        return there if len(there) >= count else None

    return {name: json.loads(text) for name, text in eventually(found, place.wait_s).items()}


def process(launcher: Launcher, name: str) -> Process:
    return next(process for process in launcher.processes() if process.name == name)


def test_copies_get_words_environment_and_gpus(place: Place, tmp_path: Path) -> None:
    """Two copies share a GPU where each has half of one; each has a name, none the same."""
    folder = tmp_path / "it's here"
    launcher = place.open("gpus")
    launcher.start(job(place, folder, NASTY, "--flag", gpus=0.5, SWEEPER_TEST=NASTY), 4)
    found = all_here(folder, 4, place)
    assert all(copy["words"] == [NASTY, "--flag"] for copy in found.values())
    environments = [copy["environment"] for copy in found.values()]
    assert [each["SWEEPER_TEST"] for each in environments] == [NASTY] * 4
    assert {each[WORKER_VARIABLE] for each in environments} == set(found)
    assert sorted(each["CUDA_VISIBLE_DEVICES"] for each in environments) == ["0", "0", "1", "1"]
    listed = {process.name: process for process in alive(launcher)}
    assert listed.keys() == found.keys()
    assert all(process.pid in {None, found[name]["pid"]} for name, process in listed.items())
    launcher.stop(now=True)
    assert not alive(launcher)
    assert not said(folder, "bye"), "a copy that is ended at once has no time for a word"


def test_a_copy_that_ends_well_is_over_and_its_log_is_there(place: Place, tmp_path: Path) -> None:
    launcher = place.open("ends")
    launcher.start(job(place, tmp_path, "ends"), 1)
    (name,) = all_here(tmp_path, 1, place)
    eventually(lambda: not alive(launcher), place.wait_s)
    assert process(launcher, name).exit_code == 0
    assert launcher.log(name, 3).splitlines() == [f"line {line} of {name}" for line in (27, 28, 29)]
    assert len(said(tmp_path)) == 1, "it must not be started again"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_copy_that_others_end_is_dead_and_another_takes_its_place(
    place: Place, tmp_path: Path, number: signal.Signals
) -> None:
    """The successor has another name, and ends in good order when the launcher tells it to."""
    launcher = place.open("killed")
    work = job(place, tmp_path)
    launcher.start(work, 1)
    ((first, copy),) = all_here(tmp_path, 1, place).items()
    assert copy["environment"].get("CUDA_VISIBLE_DEVICES") == ""
    assert copy["environment"]["OMP_NUM_THREADS"] == "1"
    assert launcher.log(first, 1) == f"line 29 of {first}"
    os.kill(copy["pid"], number)
    eventually(lambda: process(launcher, first).exit_code is not None, place.wait_s)
    assert process(launcher, first).exit_code != 0
    if not place.restarts:
        launcher.start(work, 1)
    (second,) = all_here(tmp_path, 2, place).keys() - {first}
    eventually(lambda: [copy.name for copy in alive(launcher)] == [second], place.wait_s)
    began = time.monotonic()
    launcher.stop()
    assert time.monotonic() - began < place.wait_s / 2, "asking must not wait for the end"
    eventually(lambda: not alive(launcher), place.wait_s)
    heard = {first, second} if number == signal.SIGTERM else {second}
    assert said(tmp_path, "bye") == dict.fromkeys(heard, "TERM came")
    assert process(launcher, second).exit_code in {0, 143}

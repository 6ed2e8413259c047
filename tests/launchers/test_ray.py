"""What Ray adds to the contract: keepers that outlive a launch, come back, and wait for room."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli.conftest import Sweeper
from launchers.conftest import Place, group
from launchers.test_contract import alive, all_here, eventually, job, process, said

from sweeper.errors import MissingExtraError, OutOfReachError, UsageError
from sweeper.launchers import open_launcher
from sweeper.launchers.ray import lock
from sweeper.settings import LAUNCHER_VARIABLE, WORKER_VARIABLE


def test_a_later_launcher_finds_the_copies_and_forgets_those_that_ended(
    ray_place: Place, tmp_path: Path
) -> None:
    first = ray_place.open("again")
    first.start(job(ray_place, tmp_path), 1)
    (name,) = all_here(tmp_path, 1, ray_place)
    second = ray_place.open("again")
    assert [copy.name for copy in alive(second)] == [name]
    assert second.log(name, 1) == f"line 29 of {name}"
    assert not alive(ray_place.open("another group"))
    second.stop()
    eventually(lambda: not alive(first), ray_place.wait_s)
    assert process(first, name).exit_code in {0, 143}
    assert said(tmp_path, "bye") == {name: "TERM came"}
    assert ray_place.open("again").processes() == []


def test_a_killed_keeper_comes_back_and_its_child_ends(ray_place: Place, tmp_path: Path) -> None:
    launcher = ray_place.open("keeper")
    launcher.start(job(ray_place, tmp_path), 1)
    ((first, copy),) = all_here(tmp_path, 1, ray_place).items()
    keeper = psutil.Process(copy["pid"]).parent()
    assert keeper is not None
    keeper.kill()
    all_here(tmp_path, 2, ray_place)
    eventually(lambda: said(tmp_path, "bye"), ray_place.wait_s)
    assert said(tmp_path, "bye") == {first: "TERM came"}
    eventually(lambda: len(alive(launcher)) == 1, ray_place.wait_s)
    assert process(launcher, first).exit_code == -signal.SIGKILL


def test_copies_without_room_wait_and_are_not_dead(ray_place: Place, tmp_path: Path) -> None:
    launcher = ray_place.open("room")
    waiting = launcher.start(job(ray_place, tmp_path, gpus=3.0), 2)
    assert [copy.device for copy in waiting] == ["waiting", "waiting"]
    assert len(alive(launcher)) == 2
    launcher.stop()
    eventually(lambda: not alive(launcher), ray_place.wait_s)
    assert not said(tmp_path)


def test_room_is_counted_by_gpus_or_else_by_cores(ray_place: Place) -> None:
    launcher = ray_place.open("counting")
    assert [launcher.fitting(gpus) for gpus in (1.0, 0.25, 2.0, 8.0, 0.0)] == [2, 8, 1, 1, 4]
    assert not launcher.elsewhere


@pytest.mark.parametrize(
    ("address", "detached", "part"),
    [
        ("ray://head:10001", False, "must be host:port"),
        ("local", True, "ray start --head"),
        ("", True, "RAY_ADDRESS names none"),
    ],
)
def test_what_cannot_be_joined_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, detached: bool, part: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=part):
        open_launcher("ray", replace(group("any", tmp_path), detached=detached))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-port"])
def test_a_head_that_does_not_listen_is_out_of_reach(ray_cluster: None, address: str) -> None:
    from sweeper.launchers import ray_cluster as cluster

    with pytest.raises(OutOfReachError, match=f"RAY_ADDRESS={address}"):
        cluster._knock(address)


def test_a_cluster_of_our_own_has_a_token_unless_somebody_decided_otherwise() -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    lock(first)
    lock(second)
    assert first["RAY_AUTH_MODE"] == "token"
    assert len({first["RAY_AUTH_TOKEN"], second["RAY_AUTH_TOKEN"]}) == 2
    for decided in (
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "known"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/a/file"},
    ):
        after = dict(decided)
        lock(after)
        assert after == decided


def test_without_the_package_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or a token would stay in this process
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "sweeper.launchers.ray_cluster", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'sweeper\[ray\]'"):
        open_launcher("ray", group("any", tmp_path))


def workers(study: str) -> Mapping[int, Mapping[str, str]]:
    """Process id → environment of the workers that train a study."""
    found = {}
    for candidate in psutil.process_iter(["cmdline"]):
        words = candidate.info["cmdline"] or []
        if {"worker", study} <= set(words):
            found[candidate.pid] = candidate.environ()
    return found


@pytest.mark.mlflow
def test_a_detached_launch_leaves_workers_that_the_next_one_takes_over(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine alone SQLite will do. A worker per copy, none twice, and all end."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    folder = tmp_path / "my sweeps"
    folder.mkdir()
    sweeper = Sweeper(folder)
    name = f"taken-over-{os.getpid()}"
    train = {"epochs": 40, "batch_size": 4}
    file = sweeper.write(name=name, train=train, resources={"gpus_per_worker": 0.5})
    words: tuple[Any, ...] = ("launch", file, "--launcher", "ray", "--workers", "1")
    sweeper.run(*words, "--detach")
    started = eventually(lambda: workers(name), 120)
    result = sweeper.json(*words)
    assert result["trials"]["complete"] == 3
    assert not workers(name)
    (environment,) = started.values()
    assert environment[LAUNCHER_VARIABLE] == "ray"
    assert environment["CUDA_VISIBLE_DEVICES"] in {"0", "1"}
    logs = [file.stem for file in (folder / ".sweeper/logs" / name).glob("*.log")]
    assert logs == [environment[WORKER_VARIABLE]]

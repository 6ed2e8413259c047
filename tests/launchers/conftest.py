"""Launchers on the real thing. Each gives a place in which the contract can be tried."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from launchers.slurm_cluster import GPUS, SHARDS, SlurmCluster, cluster

from sweeper.launchers import Group, Launcher, LocalLauncher, forks, local, open_launcher
from sweeper.launchers.slurm import SlurmLauncher
from sweeper.study.spec import Resources


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a launcher finds two GPUs, real or not. ``restarts``: it replaces dead copies itself.

    ``forks``: copies without a GPU are forks of one process. ``open`` gives a launcher; with the
    same name, one for the same group. ``wait_s`` is how long the place may take to start or end
    something on a busy machine.
    """

    open: Callable[[str], Launcher]
    restarts: bool
    forks: bool = False
    wait_s: float = 60.0


def group(name: str, logs: Path) -> Group:
    """A group with nothing special about it."""
    return Group(name=name, logs=logs, resources=Resources())


@pytest.fixture
def local_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """This machine, with two GPUs that only their numbers make."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    local.gpus.cache_clear()
    opened: list[Launcher] = []

    def open_(name: str) -> Launcher:
        opened.append(LocalLauncher())
        return opened[-1]

    yield Place(open=open_, restarts=False)
    for launcher in opened:
        launcher.stop(now=True)
    local.gpus.cache_clear()


@pytest.fixture
def forked_place(local_place: Place) -> Place:
    """This machine, for a job whose command can be forked."""
    if not forks.POSSIBLE:
        pytest.skip("this system has no pidfd, so that nothing is forked")
    return replace(local_place, forks=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of one machine with two GPUs that only Ray believes in."""
    ray: Any = pytest.importorskip("ray", reason="Ray is not installed: sweeper[ray]")
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=2,
            namespace="sweeper",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100_000_000,
            _temp_dir=folder,  # sockets: its path must be short
            _system_config={"prestart_worker_first_driver": False},
        )
        yield
        ray.shutdown()


@pytest.fixture
def ray_place(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """The Ray cluster, without what the test left in it."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # this process has joined the one that is meant
    opened: list[Launcher] = []

    def open_(name: str) -> Launcher:
        opened.append(open_launcher("ray", group(f"{tmp_path.name}-{name}", tmp_path / "logs")))
        return opened[-1]

    yield Place(open=open_, restarts=True)
    for launcher in opened:
        launcher.stop(now=True)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A SLURM cluster of two nodes with two GPUs each that only SLURM believes in."""
    with cluster() as started:
        yield started


@pytest.fixture
def slurm_place(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """One node of the cluster, without the jobs that the test left in it."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    opened: list[Launcher] = []
    resources = {"slurm": {"shards_per_gpu": SHARDS // GPUS, "flags": ["--nodelist=n1"]}}

    def open_(name: str) -> Launcher:
        of = Group(
            name=f"{tmp_path.name}-{name}",
            logs=tmp_path / "logs",
            resources=Resources.model_validate(resources),
        )
        opened.append(SlurmLauncher(of, look_s=0.2))
        return opened[-1]

    yield Place(open=open_, restarts=True)
    for launcher in opened:
        launcher.stop(now=True)


PLACES = ("local", "forked", "ray", "slurm")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Each launcher's place in turn."""
    found: Place = request.getfixturevalue(f"{request.param}_place")
    return found

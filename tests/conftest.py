"""Fixtures shared by all tests: real servers, started once, and small data sets in real formats."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from small_data import learnable_images, write_idx_family

if TYPE_CHECKING:
    from servers.postgres import Postgres

# Servers' libraries are loaded by the fixtures that start servers: the GPU tests run where none is.

# Read when torch is first imported, here and in child processes. Tests run beside each other, and
# two threads of torch on a busy core wait for each other twenty times as long as they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m gpu`` runs on machines with torch and little else: no other files are even imported."""
    if config.option.markexpr != "gpu":
        return None
    whole = collection_path.is_dir()
    files = collection_path.rglob("test_*.py") if whole else [collection_path]
    return None if any("pytest.mark.gpu" in file.read_text() for file in files) else True


@contextlib.contextmanager
def _postgres(folder: Path) -> Iterator[Postgres]:
    pytest.importorskip("pgserver", reason="the wheel pgserver is not installed")
    from servers.postgres import Postgres

    with contextlib.closing(Postgres(folder / "postgres.log")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Creates an empty database, on a server that ends with the tests, and gives its URL."""
    with _postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield lambda: server.create(f"sweeps_{uuid.uuid4().hex[:12]}")


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    """A PostgreSQL server of one's own, to be broken."""
    with _postgres(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server that ends with the tests."""
    from sweeper.settings import Settings
    from sweeper.tracking import LocalServer

    home = tmp_path_factory.mktemp("mlflow home")
    with LocalServer(Settings.resolve(home=home, environment={})) as server:
        yield server.ensure()


@pytest.fixture
def nasty_folder(tmp_path: Path) -> Path:
    """An empty folder whose name has what breaks careless quoting."""
    folder = tmp_path / """it's a "data" folder; 100% $HOME é"""
    folder.mkdir()
    return folder


@pytest.fixture
def idx_folder(nasty_folder: Path) -> Callable[..., Path]:
    """Writes ``train`` and ``test`` images of an MNIST-like data set and gives the data folder."""

    def write(
        name: str = "kmnist", *, train: int = 200, test: int = 50, packed: bool = False
    ) -> Path:
        families = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
        raw = nasty_folder / families[name] / "raw"
        write_idx_family(raw, train=train, test=test, packed=packed)
        return nasty_folder

    return write


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``train`` and ``test`` pictures of each class and gives the root folder."""

    def write(
        classes: Sequence[str] = ("cat", "it's a dog"),
        *,
        train: int = 12,
        test: int = 4,
        size: tuple[int, int] = (8, 8),
        mode: str = "RGB",
        suffix: str = ".png",
    ) -> Path:
        root = tmp_path / 'my "own" pictures'
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        for part, count, seed in (("train", train, 0), ("test", test, 1)):
            images, labels = learnable_images(count * len(classes), shape, len(classes), seed)
            for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                folder = root / part / classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{i:05d}{suffix}")
        return root

    return write

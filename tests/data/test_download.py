"""Downloads, from a real server on this machine, and what is said without one."""

from __future__ import annotations

import functools
import hashlib
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from sweeper.config.data import Kmnist
from sweeper.data.idx import idx
from sweeper.errors import DataNotFoundError

KMNIST = Kmnist(name="kmnist")
FILES = [name for name, _ in datasets.KMNIST.resources]


class _Server(http.server.ThreadingHTTPServer):
    """Serves a folder and remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(_Files, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Files(http.server.SimpleHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        self.server.requests.append(self.path.lstrip("/"))


@pytest.fixture
def server(idx_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    """Has the packed files of a small KMNIST, which torchvision believes to be the real one."""
    origin = idx_folder("kmnist", packed=True) / "KMNIST" / "raw"
    resources = [(name, hashlib.md5((origin / name).read_bytes()).hexdigest()) for name in FILES]
    with _Server(origin) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(datasets.KMNIST, "resources", resources)
        monkeypatch.setattr(datasets.KMNIST, "mirrors", [running.address])
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [address])
    return address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new 'data' folder"


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "KMNIST" / "raw").glob("[!.]*"))


def test_files_are_fetched_once(server: _Server, folder: Path) -> None:
    first = idx(KMNIST, folder)
    again = idx(KMNIST, folder)
    assert np.array_equal(first.train.images, again.train.images)
    assert first.train.images.shape == (200, 1, 28, 28)
    assert sorted(server.requests) == sorted(FILES)
    assert visible(folder) == sorted(FILES)


def test_only_what_is_missing_is_fetched(server: _Server, folder: Path) -> None:
    idx(KMNIST, folder)
    server.requests.clear()
    (folder / "KMNIST" / "raw" / FILES[2]).unlink()
    idx(KMNIST, folder)
    assert server.requests == [FILES[2]]


def test_workers_that_start_together_fetch_once(server: _Server, folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        shapes = list(pool.map(lambda _: idx(KMNIST, folder).test.images.shape, range(4)))
    assert shapes == [(50, 1, 28, 28)] * 4
    assert sorted(server.requests) == sorted(FILES)


def test_the_second_mirror_serves_when_the_first_does_not(
    server: _Server, unreachable: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [unreachable, server.address])
    assert len(idx(KMNIST, folder).train.labels) == 200


def test_a_wrong_checksum_is_refused_and_leaves_nothing(
    server: _Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = [(name, "0" * 32) for name in FILES]
    monkeypatch.setattr(datasets.KMNIST, "resources", resources)
    with pytest.raises(DataNotFoundError, match=r"MD5 checksum must be 0{32}, but is [0-9a-f]{32}"):
        idx(KMNIST, folder)
    assert visible(folder) == []
    assert not list((folder / "KMNIST" / "raw").glob(".*ubyte*"))


def test_a_missing_file_on_the_server_is_told(server: _Server, folder: Path) -> None:
    datasets.KMNIST.resources[1] = ("absent.gz", "0" * 32)
    with pytest.raises(DataNotFoundError, match=r"absent.gz: HTTP Error 404"):
        idx(KMNIST, folder)


def test_without_a_network_the_message_says_what_to_do(unreachable: str, folder: Path) -> None:
    with pytest.raises(DataNotFoundError) as caught:
        idx(KMNIST, folder)
    message = str(caught.value)
    for part in (
        str(folder / "KMNIST" / "raw"),
        *(name.removesuffix(".gz") for name in FILES),
        "SWEEPER_DATA",
        "image_folder",
        unreachable,
        "refused",
    ):
        assert part in message


def test_a_server_that_never_answers_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeper.data.download.ANSWER_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(datasets.KMNIST, "mirrors", [address, address])
        started = time.monotonic()
        with pytest.raises(DataNotFoundError, match=r"timed out.*timed out"):
            idx(KMNIST, folder)
        assert time.monotonic() - started < 3


def test_a_name_look_up_that_hangs_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resolver has time-outs of its own, which no socket option bounds."""
    released = threading.Event()

    def hang(*args: object, **kwargs: object) -> list[object]:
        released.wait(20)
        raise OSError("released")

    monkeypatch.setattr("sweeper.data.download.ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.setattr(datasets.KMNIST, "mirrors", ["http://data.invalid/"])
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(DataNotFoundError, match=r"data.invalid did not answer within 0.1 s"):
        idx(KMNIST, folder)
    released.set()


def test_workers_that_wait_for_a_failing_download_fail_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six workers of an offline machine are told after one time-out, not after six."""
    monkeypatch.setattr("sweeper.data.download.ANSWER_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(datasets.KMNIST, "mirrors", [address])

        def attempt(_: int) -> str:
            with pytest.raises(DataNotFoundError) as caught:
                idx(KMNIST, folder)
            return str(caught.value)

        started = time.monotonic()
        with ThreadPoolExecutor(6) as pool:
            messages = set(pool.map(attempt, range(6)))
        assert time.monotonic() - started < 4
    assert len(messages) == 1


def test_a_failure_is_no_reason_not_to_try_again_later(
    unreachable: str, folder: Path, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [unreachable])
    with pytest.raises(DataNotFoundError):
        idx(KMNIST, folder)
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [server.address])
    assert len(idx(KMNIST, folder).train.labels) == 200


def test_a_data_folder_that_cannot_be_made_is_told(unreachable: str, folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(DataNotFoundError, match=r"SWEEPER_DATA.*(Not a directory|File exists)"):
        idx(KMNIST, folder)

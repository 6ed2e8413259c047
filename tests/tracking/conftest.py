"""A network between tracker and server that can be cut, even between question and answer."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from sweeper.tracking import RunStart


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def begin() -> Callable[..., RunStart]:
    """Makes the start of a run, by default in an experiment of its own."""
    own = f"study-{uuid.uuid4().hex[:8]}"

    def make(
        number: int = 1, *, experiment: str = own, at_ms: int | None = None, **more
    ) -> RunStart:
        return RunStart(
            key=f"{experiment}/{number}",
            experiment=experiment,
            name=f"{number:04d}",
            start_time_ms=now_ms() if at_ms is None else at_ms,
            **more,
        )

    return make


@dataclass
class Proxy:
    """Passes TCP connections on to a server, as long as it is told to.

    ``cut`` refuses new connections and drops open ones. With ``swallow_answers`` = n the next n
    answers never arrive, though the server has done what was asked.
    """

    target: tuple[str, int]
    swallow_answers: int = 0
    swallowed: int = 0
    _open: set[socket.socket] = field(default_factory=set)
    _listener: socket.socket | None = None
    _port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def connect(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(64)
        self._port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self.target)
                self._open |= {near, far}
                for source, sink, answers in ((near, far, False), (far, near, True)):
                    threading.Thread(
                        target=self._pump, args=(source, sink, answers), daemon=True
                    ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and self.swallow_answers > 0:
                    self.swallow_answers -= 1
                    self.swallowed += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)


@pytest.fixture
def proxy(mlflow_server: str) -> Iterator[Proxy]:
    """A connected way to the MLflow server."""
    host, port = mlflow_server.removeprefix("http://").split(":")
    way = Proxy((host, int(port)))
    way.connect()
    yield way
    way.cut()

"""``/healthz``, ``/livez`` and ``/metrics`` of a controller, on one port.

``/healthz`` says whether it can do its work, ``/livez`` whether it should be left to itself, as it
should while its store is away.
Nothing here is secret but the studies' names; it listens on 127.0.0.1 unless told otherwise.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self

from prometheus_client.exposition import choose_encoder

from sweeper.errors import UsageError
from sweeper.private import redacted
from sweeper.service.board import Board, registry

_REQUEST_S: Final = 10.0


class Endpoint:
    """Serves the board at ``host:port`` while the context lasts. Port 0: any that is free.

    Raises UsageError where the port cannot be had.
    """

    def __init__(self, board: Board, host: str, port: int) -> None:
        self._board, self._host, self.port = board, host, port

    def __enter__(self) -> Self:
        try:
            self._server = _Server((self._host, self.port), _handler(self._board))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"the controller must listen on {self._host}:{self.port}, but that cannot be had: "
                f"{getattr(error, 'strerror', None) or error}; choose another with --port"
            ) from error
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        """For people to open."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, place: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        import socket

        if ":" in place[0]:
            self.address_family = socket.AF_INET6
        super().__init__(place, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


def _handler(board: Board) -> type[BaseHTTPRequestHandler]:
    known = registry(board)

    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_S
        server_version = "sweeper"
        sys_version = ""

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/healthz":
                    self._say(redacted(board.trouble))
                case "/livez":
                    self._say(board.stuck)
                case "/metrics":
                    encode, kind = choose_encoder(self.headers.get("Accept", ""))
                    self._answer(200, encode(known), kind)
                case _:
                    self._answer(
                        404,
                        "there are /healthz, /livez and /metrics here",
                        "text/plain; charset=utf-8",
                    )

        def do_HEAD(self) -> None:
            self.do_GET()

        def _say(self, trouble: str) -> None:
            self._answer(503 if trouble else 200, trouble or "ok", "text/plain; charset=utf-8")

        def _answer(self, status: int, body: str | bytes, kind: str) -> None:
            content = body if isinstance(body, bytes) else f"{body}\n".encode()
            self.send_response(status)
            self.send_header(
                "Content-Type", kind if "charset" in kind else f"{kind}; charset=utf-8"
            )
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_arguments: Any) -> None:
            """A line a probe is nobody's news."""

    return Handler

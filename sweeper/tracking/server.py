"""The embedded MLflow server: started where no tracking address is set, for one home folder.

It listens on 127.0.0.1 only, keeps its artifacts in the home folder and its database there too, or
beside a PostgreSQL store, such that both can be read without it, and ends with the process that
started it, even if that is killed. ``server.json`` in the home folder tells where it is; a second
process on the same home uses the server that is there, and after a restart the port is the same, so
that addresses in a browser and in workers stay good.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from pathlib import Path
from typing import Final, Self

import psutil
from filelock import FileLock, Timeout

from sweeper.errors import TrackerUnreachableError
from sweeper.private import FILE_MODE, private_folder, private_opener
from sweeper.settings import Settings

_HOST: Final = "127.0.0.1"
_HEALTH_TIMEOUT_S: Final = 5.0
_UNWELL_CHECKS: Final = 3
_STOP_S: Final = 5.0
_LOG_BYTES: Final = 10 << 20


class LocalServer:
    """The MLflow server of one home folder, as seen by a process that needs it."""

    def __init__(self, settings: Settings, *, start_timeout_s: float = 90.0) -> None:
        self._settings = settings
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._unwell = 0

    def __enter__(self) -> Self:
        self.ensure()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def ensure(self) -> str:
        """The server's address; it is started if there is none, or again if it died or hangs.

        Cheap enough to be called every few seconds. Raises TrackerUnreachableError with the end
        of the server's log where it does not start.
        """
        known = _known(self._settings)
        if known is not None:
            if _healthy(known[1]):
                self._unwell = 0
                return _address(known[1])
            self._unwell += 1
            if self._unwell < _UNWELL_CHECKS:
                return _address(known[1])
        private_folder(self._settings.home)
        try:
            with FileLock(
                self._settings.server_file.with_suffix(".lock"),
                timeout=self._start_timeout_s,
                mode=FILE_MODE,
            ):
                return self._find_or_start()
        except Timeout as error:
            raise TrackerUnreachableError(
                f"another process has been starting the MLflow server of {self._settings.home} "
                f"for {self._start_timeout_s:.0f} s; see {self._settings.server_log}"
            ) from error

    def stop(self) -> None:
        """End the server if this process started it; one that another started stays."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                continue
            break
        process.wait()

    def _find_or_start(self) -> str:
        """With the lock held: another process may have started it meanwhile."""
        known = _known(self._settings)
        if known is not None:
            if _healthy(known[1]):
                return _address(known[1])
            if self._process is None or known[0] != self._process.pid:
                raise TrackerUnreachableError(
                    f"the MLflow server of {self._settings.home} (process {known[0]}) must answer "
                    f"on port {known[1]}, but does not; end it, and it is started again"
                )
        self.stop()
        self._unwell = 0
        return self._launch()

    def _launch(self) -> str:
        settings = self._settings
        log = settings.server_log
        private_folder(log.parent)
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        begins = log.stat().st_size if log.exists() else 0
        listener = _listener(settings)
        port = int(listener.getsockname()[1])
        with listener, open(log, "ab", opener=private_opener) as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sweeper.tracking.serve"),
                    *("--socket", str(listener.fileno())),
                    *("--parent", str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **settings.environment()},  # an address may have a password
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for us; the server ends after the last record
            )
        try:
            self._wait_until_healthy(self._process, port, begins)
            _write(settings.server_file, self._process.pid, port)
        except BaseException:
            self.stop()
            raise
        return _address(port)

    def _wait_until_healthy(
        self, process: subprocess.Popen[bytes], port: int, log_begins: int
    ) -> None:
        until = time.monotonic() + self._start_timeout_s
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > until:
                found = (
                    f"ended with code {process.returncode}"
                    if process.returncode is not None
                    else f"does not answer after {self._start_timeout_s:.0f} s"
                )
                raise TrackerUnreachableError(
                    f"the MLflow server must start, but {found}; the end of "
                    f"{self._settings.server_log}:\n{_tail(self._settings.server_log, log_begins)}"
                )
            time.sleep(0.05)


def running_address(settings: Settings) -> str | None:
    """The address of the server of this home folder, or None while none runs."""
    known = _known(settings)
    return None if known is None else _address(known[1])


def _address(port: int) -> str:
    return f"http://{_HOST}:{port}"


def _read(file: Path) -> dict[str, float]:
    try:
        raw = json.loads(file.read_text())
        return {name: float(raw[name]) for name in ("pid", "port", "started")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(file: Path, pid: int, port: int) -> None:
    temporary = file.with_suffix(".json.tmp")
    started = psutil.Process(pid).create_time()
    with open(temporary, "w", encoding="utf-8", opener=private_opener) as stream:
        json.dump({"pid": pid, "port": port, "started": started}, stream)
    temporary.replace(file)


def _known(settings: Settings) -> tuple[int, int] | None:
    """Process id and port of the server in ``server.json``, if that very process still lives."""
    found = _read(settings.server_file)
    if not found:
        return None
    try:
        process = psutil.Process(int(found["pid"]))
        same = abs(process.create_time() - found["started"]) < 1
        if not same or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.Error:
        return None
    return int(found["pid"]), int(found["port"])


def _healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{_address(port)}/health", timeout=_HEALTH_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _listener(settings: Settings) -> socket.socket:
    """A listening socket: the port of last time, else one that belongs to this folder, else any.

    The socket itself is handed to the server, so nobody can take the port in between. The folder's
    port is below those that Linux gives to outgoing connections.
    """
    last = int(_read(settings.server_file).get("port", 0))
    own = 20_000 + zlib.crc32(str(settings.home).encode()) % 10_000
    for port in (last or own, own, 0):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, port))
            listener.listen(128)  # early callers wait, and nobody else gets this port
        except OSError:
            listener.close()
        else:
            return listener
    raise TrackerUnreachableError(f"no port of {_HOST} can be had for the MLflow server")


def _tail(log: Path, begins: int, lines: int = 20) -> str:
    """The last lines of what was written after the byte ``begins``."""
    try:
        written = log.read_bytes()[begins:].decode(errors="replace")
        return "\n".join(written.splitlines()[-lines:])
    except OSError as error:
        return str(error)

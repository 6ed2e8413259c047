"""A PostgreSQL server that tests may break."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


class Postgres:
    """A PostgreSQL server of one's own, to be broken."""

    def __init__(self, folder: Path) -> None:
        import pgserver

        self._data = folder
        self._server = pgserver.get_server(folder)
        self.url = self._server.get_uri()

    def _processes(self) -> list[psutil.Process]:
        main = psutil.Process(int((self._data / "postmaster.pid").read_text().splitlines()[0]))
        return [main, *main.children(recursive=True)]

    def kill(self) -> None:
        processes = self._processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=20)

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def stop(self) -> None:
        for process in self._processes():
            process.suspend()

    def go_on(self) -> None:
        for process in self._processes():
            process.resume()

    def close(self) -> None:
        self._server.cleanup()

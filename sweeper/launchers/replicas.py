"""Replicas: copies of one command, kept alive on this machine until they are told to end.

What a container runs that has several GPUs: one worker a GPU, the lines of all of them on the
container's own stderr.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sweeper.launchers.base import Job, Launcher, Process

_log = logging.getLogger(__name__)

_LOOK_S: Final = 0.2
_QUICK_DEATH_S: Final = 20.0
_LONGEST_PAUSE_S: Final = 60.0
_READ_LOG_BYTES: Final = 8 << 20
_TOLD: Final = {
    code for number in (signal.SIGTERM, signal.SIGINT) for code in (128 + number, -number)
}
"""The codes of a copy that ends because it is told to, in good order or before it listened."""


@dataclass(kw_only=True)
class Replicas:
    """``count`` copies of ``job``; one that dies is replaced, one that ends with 0 is done.

    Copies that die within seconds of their start are replaced after a pause, which doubles up to
    a minute. What the copies write is passed on to stderr, each line with the copy's name; their
    log files hold what was not passed on yet, and not more.
    """

    launcher: Launcher
    job: Job
    count: int
    _read: dict[str, int] = field(default_factory=dict)
    _buried: set[str] = field(default_factory=set)
    _done: int = 0
    _hasty: bool = False
    _pause_s: float = 0.0
    _not_before: float = 0.0

    def run(self, signals: Callable[[], int]) -> bool:
        """Keep the copies alive until all are done, or ``signals()`` counts one and all ended.

        Whether all were done. A copy that somebody else told to end is not, and is replaced.
        Every further signal is passed on as well: a worker's second one has it end at once.
        """
        passed_on = 0
        while True:
            processes = [
                process for process in self.launcher.processes() if process.name not in self._buried
            ]
            self._echo(processes)
            self._bury(processes, told=bool(passed_on))
            alive = [process for process in processes if process.exit_code is None]
            if signals() > passed_on:
                passed_on += 1
                self.launcher.stop()
            missing = 0 if passed_on else self.count - self._done - len(alive)
            if not alive and not missing:
                return self._done == self.count
            if missing and time.monotonic() >= self._not_before:
                self._hasty = False
                self.launcher.start(self.job, missing)
            time.sleep(_LOOK_S)

    def _bury(self, processes: list[Process], *, told: bool) -> None:
        """Count who is done, and put off replacing those who die at once."""
        for process in processes:
            if process.exit_code is None:
                continue
            self._buried.add(process.name)
            if process.exit_code == 0:
                self._done += 1
                continue
            if told and process.exit_code in _TOLD:
                continue
            if process.lived_s >= _QUICK_DEATH_S:
                self._pause_s = 0.0
            elif not self._hasty:  # several that die together are one misfortune
                self._hasty = True
                self._pause_s = min(_LONGEST_PAUSE_S, max(1.0, 2 * self._pause_s))
                self._not_before = time.monotonic() + self._pause_s
            _log.warning(
                "%s on %s ended with %d after %.0f s",
                *(process.name, process.device, process.exit_code, process.lived_s),
            )

    def _echo(self, processes: list[Process]) -> None:
        """Pass on the whole lines that were written since the last look."""
        for process in processes:
            try:
                with Path(process.log).open("rb") as stream:
                    stream.seek(self._read.get(process.log, 0))
                    written = stream.read()
            except OSError:
                continue
            whole, _, rest = written.rpartition(b"\n")
            if process.exit_code is not None:
                whole, rest = written, b""
            for line in whole.decode(errors="replace").splitlines():
                sys.stderr.write(f"{process.name} | {line}\n")
            read = self._read.get(process.log, 0) + len(written) - len(rest)
            if read > _READ_LOG_BYTES and not rest:
                os.truncate(process.log, 0)  # the copy appends, so it goes on at the start
                read = 0
            self._read[process.log] = read

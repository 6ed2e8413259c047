"""A keeper runs a command line as its child and starts it again when it dies.

What it knows is a :class:`Record`, published at every change, so that whoever wants to know need
not ask the keeper itself, which may have gone with its machine. Each run has a name of its own:
the trial of a worker that was cut off is never taken for its successor's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from sweeper.launchers import tied
from sweeper.launchers.base import tail
from sweeper.settings import WORKER_VARIABLE, cluster_worker_name

_QUICK_DEATH_S: Final = 20.0
_QUICK_DEATHS: Final = 5
_FIRST_PAUSE_S: Final = 0.5
_LAST_WORDS: Final = 40
_REMEMBERED: Final = 20
_FINAL_CODES: Final = frozenset({0, 2})
"""Nothing is left to do, or nothing can be done: starting again would change neither."""

GONE: Final = -int(signal.SIGKILL)
"""The exit code of a run whose keeper is gone, and which nobody saw end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One start of the command. ``pid`` is None before it, ``exit_code`` before its end.

    ``said`` is the end of its output, once it has ended.
    """

    name: str
    pid: int | None = None
    began: float = field(default_factory=time.time)
    lived_s: float | None = None
    exit_code: int | None = None
    said: str = ""

    def ended(self, exit_code: int, *, lived_s: float | None = None, said: str = "") -> Run:
        """The same run after its end."""
        if lived_s is None:
            lived_s = max(0.0, time.time() - self.began)
        return replace(self, exit_code=exit_code, lived_s=lived_s, said=said)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is known of a keeper: where it is, and its runs, the last of which may be alive."""

    host: str
    node: str
    device: str
    logs: str
    runs: tuple[Run, ...] = ()

    def after_the_keeper(self) -> tuple[Run, ...]:
        """The runs where the keeper is gone, and with it whatever it kept."""
        return tuple(run if run.exit_code is not None else run.ended(GONE) for run in self.runs)

    def public(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def of(cls, public: Mapping[str, Any]) -> Self:
        """The record that :meth:`public` gave."""
        return cls(**{**public, "runs": tuple(Run(**run) for run in public["runs"])})


class Keeper:
    """Keeps one command running until it ends well, is told to stop, or dies too often at once."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        record: Record,
        publish: Callable[[Record], None],
    ) -> None:
        """``environment`` is complete. ``record`` may hold the runs of a keeper before this one."""
        self._name = name
        self._argv = list(argv)
        self._environment = dict(environment)
        self._logs = Path(record.logs)
        self._publish = publish
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._record = replace(record, runs=record.after_the_keeper())

    def run(self) -> None:
        """Return when there is nothing left to keep. The child is tied to the calling thread."""
        quick_deaths = 0
        self._set_runs((*self._record.runs, self._next()))
        while True:
            ended = self._run_once(self._record.runs[-1])
            quick_deaths = quick_deaths + 1 if (ended.lived_s or 0.0) < _QUICK_DEATH_S else 0
            before = (*self._record.runs[-_REMEMBERED:-1], ended)
            over = ended.exit_code in _FINAL_CODES or quick_deaths >= _QUICK_DEATHS
            if over or self._stopped.is_set():
                self._set_runs(before)
                return
            # At once with its successor's name: nobody is to think that there is one too few.
            self._set_runs((*before, self._next()))
            if quick_deaths:
                self._stopped.wait(_FIRST_PAUSE_S * 2 ** (quick_deaths - 1))

    def _next(self) -> Run:
        return Run(name=cluster_worker_name(self._name))

    def _run_once(self, run: Run) -> Run:
        """Start the command, wait for its end, and say how it ended."""
        file = self._logs / f"{run.name}.log"
        try:
            self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
            with file.open("ab") as stream, self._lock:
                if self._stopped.is_set():
                    return run.ended(GONE, lived_s=0.0)
                self._process = subprocess.Popen(
                    [sys.executable, "-IS", tied.__file__, str(os.getpid()), *self._argv],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env={**self._environment, WORKER_VARIABLE: run.name},
                    start_new_session=True,
                )
        except OSError as error:
            return run.ended(1, lived_s=0.0, said=f"the worker could not be started: {error}")
        began = time.monotonic()
        run = replace(run, pid=self._process.pid, began=time.time())
        self._set_runs((*self._record.runs[:-1], run))
        code = self._process.wait()
        return run.ended(code, lived_s=time.monotonic() - began, said=tail(file, _LAST_WORDS))

    def _set_runs(self, runs: tuple[Run, ...]) -> None:
        self._record = replace(self._record, runs=runs)
        self._publish(self._record)

    def log(self, name: str, lines: int) -> str:
        """The last lines of one of the runs, which may be over."""
        return tail(self._logs / f"{name}.log", lines)

    def stop(self, *, now: bool) -> None:
        """TERM or KILL to the child, which is not started again. Returns at once."""
        with self._lock:
            self._stopped.set()
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGKILL if now else signal.SIGTERM)

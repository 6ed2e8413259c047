"""Workers as forks of one process that has imported everything.

Importing torch and MLflow costs every worker 5 s of a core and 250 MB. Where workers share cores,
one process, the *template*, imports them once; whenever the launcher asks, it forks, and the fork
goes on as a worker. A worker that died is then replaced in a tenth of a second. Only for workers
on a CPU, as a process that has touched CUDA must not fork, and only where Linux has ``pidfd``.

The template is the worker's own command line, told by an environment variable to wait for orders.
Launcher and template speak over a socket: a request is ``{name, log}``; the answers are ``{name}``
with the fork's pidfd, ``{pid, code}`` when one ended. The template ends with its launcher, however
that ended, and workers that are tied to it (``--tied``) with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sweeper.private import private_opener
from sweeper.settings import WORKER_VARIABLE

_VARIABLE: Final = "SWEEPER_FORKS"
_MESSAGE_BYTES: Final = 1 << 16

POSSIBLE: Final = hasattr(os, "pidfd_open")
"""Whether this system has what it takes."""


def fork_as_asked(prepare: Callable[[], object]) -> None:
    """In a template: ``prepare``, then fork until the launcher is gone; returns in the forks only.

    Returns at once in any other process. Call it before there are threads, open connections or
    signal handlers: a fork would have half of each.
    """
    number = os.environ.pop(_VARIABLE, None)
    if number is None:
        return
    with socket.socket(fileno=int(number)) as launcher:
        launcher.set_inheritable(False)
        prepare()
        _serve(launcher)


def _serve(launcher: socket.socket) -> None:
    """Answer requests; returns in a fork, which has its name, its log and a session of its own."""
    living: dict[int, int] = {}
    waiting = select.poll()
    waiting.register(launcher, select.POLLIN)
    while True:
        for ready, _ in waiting.poll():
            if ready in living:
                waiting.unregister(ready)
                _, status = os.waitpid(living[ready], 0)
                ended = {"pid": living.pop(ready), "code": os.waitstatus_to_exitcode(status)}
                os.close(ready)
                _answer(launcher, ended)
                continue
            asked = launcher.recv(_MESSAGE_BYTES)
            if not asked:
                sys.exit(0)
            request = json.loads(asked)
            pid = os.fork()
            if pid == 0:
                for handle in living:
                    os.close(handle)
                _become(request)
                return
            handle = os.pidfd_open(pid)
            living[handle] = pid
            waiting.register(handle, select.POLLIN)
            _answer(launcher, {"name": request["name"], "pid": pid}, handle)


def _answer(launcher: socket.socket, words: Mapping[str, Any], *handles: int) -> None:
    try:
        socket.send_fds(launcher, [json.dumps(words).encode()], handles)
    except OSError:  # it is gone
        sys.exit(0)


def _become(request: Mapping[str, str]) -> None:
    os.setsid()
    os.environ[WORKER_VARIABLE] = request["name"]
    log = private_opener(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)


@dataclass(kw_only=True)
class Fork:
    """The launcher's side of one fork, with what `subprocess.Popen` has of it.

    ``pid`` is None until the template has forked; ``returncode`` until it has ended. A fork of
    which nobody knows how it ended, as its template was killed, counts as killed.
    """

    template: Template
    name: str
    pid: int | None = None
    returncode: int | None = None
    handle: int | None = None

    def poll(self) -> int | None:
        """The exit code, -N after signal N, or None while it lives or is to come."""
        if self.returncode is None:
            self.template.listen()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end."""
        while self.returncode is None:
            self.template.listen(wait=True)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal; to one that is still to come, before it has come."""
        self.template.listen()
        while self.pid is None and self.returncode is None:
            self.template.deny(number)
        if self.returncode is None and self.handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, number)

    def end(self, code: int) -> None:
        """It is over."""
        self.returncode = code
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


@dataclass(kw_only=True)
class Template:
    """A process that forks, started by ``command``. What it says itself goes into ``log``."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    _forks: dict[str, Fork] = field(default_factory=dict)
    _forked: bool = False
    _gone: bool = False
    _ears: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(self.log, "ab", opener=private_opener) as stream:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**self.environment, _VARIABLE: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def usable(self) -> bool:
        """Whether it still forks."""
        self.listen()
        return not self._gone

    def fork(self, name: str, log: Path) -> Fork:
        """Ask for one more; returns before there is one."""
        asked = self._forks[name] = Fork(template=self, name=name)
        with contextlib.suppress(OSError):  # it died this moment: `listen` finds that out
            self._socket.send(json.dumps({"name": name, "log": str(log)}).encode())
        return asked

    def listen(self, *, wait: bool = False) -> None:
        """Take in what the template said, or what its end means."""
        with self._ears:
            self._hear(wait=wait)
            if not self._gone:
                return
            for fork in self._living():
                if fork.handle is None:
                    fork.end(self._process.wait() or 1)
                elif _readable(fork.handle, wait=wait):
                    fork.end(-signal.SIGKILL)

    def deny(self, number: int) -> None:
        """Let requests that are open end as by signal ``number``, or come to be first."""
        with self._ears:
            if self._forked:
                self._hear(wait=True)
                return
            self._process.kill()
            while not self._gone:
                self._hear(wait=True)  # of forks that came into being this moment
            for fork in self._living():
                if fork.handle is None:
                    fork.end(-number)

    def close(self) -> None:
        """End the template, not its forks: those that are tied to it see that they are alone."""
        with self._ears:
            self._process.kill()
            while not self._gone:
                self._hear(wait=True)

    def _living(self) -> list[Fork]:
        return [fork for fork in self._forks.values() if fork.returncode is None]

    def _hear(self, *, wait: bool) -> None:
        while not self._gone and _readable(self._socket.fileno(), wait=wait):
            wait = False
            try:
                said, handles, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
            except OSError:
                said, handles = b"", []
            if said:
                self._take(json.loads(said), handles)
            else:
                self._gone = True
                self._socket.close()
                self._process.wait()

    def _take(self, words: Mapping[str, Any], handles: Sequence[int]) -> None:
        if "name" in words:
            self._forked = True
            fork = self._forks[words["name"]]
            fork.pid, (fork.handle,) = words["pid"], handles
            return
        next(fork for fork in self._living() if fork.pid == words["pid"]).end(words["code"])


def _readable(handle: int, *, wait: bool) -> bool:
    """Whether there is something to read, or a process has ended."""
    return bool(select.select([handle], [], [], None if wait else 0)[0])

"""The tracker that workers and controller use: a journal first, the server in the background.

A call of :class:`SpoolTracker` appends one record to a local file (about 20 µs) and returns. A
thread sends what is in the file, about once a second, or for a quarter of the time where that takes
long. It waits ever longer while the server is out of reach (half a second to half a minute), and
never gives up. What a process could not send before it died, :func:`replay` sends later. Nothing is
counted as sent before the server has answered, and sending twice is harmless (see
`sweeper.tracking.shipping`).

The file is synchronized to disk when a run ends, by the thread: training does not wait for a disk.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from sweeper.errors import TrackerUnreachableError
from sweeper.private import private_folder
from sweeper.settings import NONFINITE_TAG, worker_name
from sweeper.tracking.journal import Journal, JournalFiles, claimed, left_behind, reopen
from sweeper.tracking.mlflow import ServerFailedError
from sweeper.tracking.protocol import STATUSES, Nonfinite, RunStart, plain, text
from sweeper.tracking.records import Kind, Record
from sweeper.tracking.shipping import PATIENCE, RunIdCallback, Shipper

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
_REST: Final = 3.0
"""The thread rests for so many times as long as it has sent: a call with five epochs of a run costs
little more than one with a single epoch, and while it sends Python is not training."""
_REST_SHARE: Final = 0.05
"""But for no more of its time so far: what gathers meanwhile has to be sent when all is over."""
_LONGEST_REST_S: Final = 10.0
_RESTART_BYTES: Final = 16 << 20

Address = str | Callable[[], str | None]
"""Where the server is, or a function that tells: it is asked again after every failure, and
answers None while there is none."""


@dataclass(kw_only=True, slots=True)
class _Known:
    """What the writing side remembers of a run it started. ``start`` is what its first record says,
    until the disk has that."""

    experiment: str
    study_id: str
    started_ms: int
    start: Mapping[str, Any] | None
    step: int = 0
    nonfinite: Nonfinite = field(default_factory=Nonfinite)


class SpoolTracker:
    """A :class:`~sweeper.tracking.protocol.Tracker` that keeps everything in ``folder`` first.

    ``on_run_id`` is called with a run's key and id, in the sending thread, once the server has
    named it. ``gather_s`` is how long records gather before they are sent together.
    """

    def __init__(
        self,
        folder: Path,
        address: Address,
        *,
        writer: str | None = None,
        on_run_id: RunIdCallback | None = None,
        gather_s: float = 1.0,
    ) -> None:
        private_folder(folder)
        self._journal = Journal(folder, writer or worker_name())
        self._sender = _Sender(self._journal, address, on_run_id, gather_s)
        self._runs: dict[str, _Known] = {}
        self._full = False
        self._sender.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def start(self, run: RunStart) -> None:
        data: dict[str, Any] = {
            "name": run.name,
            "params": {name: text(value) for name, value in run.params.items()},
            "tags": dict(run.tags),
            "dataset": run.dataset,
        }
        if run.owner.identity:
            data["since_ms"] = run.owner.since_ms
            data["run_ids"] = sorted(run.owner.run_ids)
        self._runs[run.key] = _Known(
            experiment=run.experiment,
            study_id=run.owner.identity,
            started_ms=run.start_time_ms,
            start=data,
        )
        self._append(Kind.START, run.key, run.start_time_ms, data)

    def log(self, key: str, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        self._known(key).step = step
        self._append(Kind.LOG, key, timestamp_ms, self._measured(key, metrics, step))

    def note(
        self,
        key: str,
        *,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        dataset: Mapping[str, Any] | None = None,
    ) -> None:
        data = self._measured(key, metrics or {}, 0, tags)
        data["params"] = {name: text(value) for name, value in (params or {}).items()}
        data["dataset"] = dataset
        self._append(Kind.NOTE, key, _now_ms(), data)

    def artifact(self, key: str, file: Path, folder: str = "") -> None:
        self._append(Kind.FILE, key, _now_ms(), {"folder": folder}, file)

    def end(
        self,
        key: str,
        *,
        status: str,
        end_time_ms: int,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, but got {status!r}")
        data = self._measured(key, metrics or {}, self._known(key).step, tags)
        self._append(Kind.END, key, end_time_ms, {**data, "status": status})

    def flush(self, timeout_s: float) -> int:
        """Wait until everything said so far has arrived; how many records have not."""
        return self._sender.flush(timeout_s)

    @property
    def problem(self) -> str:
        """What stood in the way of what was sent last; empty where it arrived."""
        return self._sender.problem

    def close(self, timeout_s: float = 10.0) -> int:
        """Flush, and end the thread; how many records are left for :func:`replay`.

        Takes ``timeout_s`` at most, and no time where the address is not known."""
        left = self._sender.close(timeout_s)
        if left == 0 and not self._sender.is_alive():
            self._journal.remove()
        self._journal.close()
        return left

    def _known(self, key: str) -> _Known:
        known = self._runs.get(key)
        if known is None:
            raise ValueError(f"the run {key!r} must be started before anything is said of it")
        return known

    def _measured(
        self,
        key: str,
        metrics: Mapping[str, float],
        step: int,
        tags: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        values, odd = plain(metrics)
        told = self._known(key).nonfinite.tag(odd, step) if odd else None
        labels = {**(tags or {}), **({NONFINITE_TAG: told} if told else {})}
        return {"metrics": values, "step": step, "tags": labels}

    def _append(
        self, kind: Kind, key: str, time_ms: int, data: Mapping[str, Any], file: Path | None = None
    ) -> None:
        """Write a record. A disk that takes nothing more costs measurements, never the trial."""
        known = self._known(key)
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"an artifact must be a file, but {file} is none")
        try:
            if known.start is not None:  # nothing of a run arrives without it
                self._write(known, Kind.START, key, known.started_ms, known.start)
                known.start = None
            if file is not None:
                data = {**data, "file": self._journal.keep_file(file)}
            if kind is not Kind.START:
                self._write(known, kind, key, time_ms, data)
            self._full = False
        except OSError as error:
            if not self._full:
                _log.warning("the spool takes no more records, they are lost: %s", error)
            self._full = True

    def _write(
        self, known: _Known, kind: Kind, key: str, time_ms: int, data: Mapping[str, Any]
    ) -> None:
        self._sender.write(
            lambda number: Record(
                number=number,
                kind=kind,
                key=key,
                experiment=known.experiment,
                study_id=known.study_id,
                started_ms=known.started_ms,
                time_ms=time_ms,
                data=data,
            )
        )


class _Sender(threading.Thread):
    """The thread that sends a journal, and what it shares with the writing side.

    ``_changed`` guards the counters and the journal's file: ``_written`` and ``_shipped`` count
    records, ``_hurried`` those who wait in ``flush``.
    """

    def __init__(
        self,
        journal: Journal,
        address: Address,
        on_run_id: RunIdCallback | None,
        gather_s: float,
    ) -> None:
        super().__init__(name="tracker", daemon=True)
        self._journal = journal
        self._address = address
        self._on_run_id = on_run_id
        self._gather_s = gather_s
        self._changed = threading.Condition()
        self._written = self._shipped = self._offset = 0
        self._hurried = 0
        self._deadline: float | None = None
        self._sync_due = False
        self._failures = 0
        self._sending_s = 0.0
        self._began = time.monotonic()
        self.problem = ""
        self._shipper: tuple[str, Shipper] | None = None

    def write(self, numbered: Callable[[int], Record]) -> None:
        with self._changed:
            record = numbered(self._written + 1)
            self._journal.append(record)
            self._written += 1
            self._sync_due = self._sync_due or record.kind is Kind.END
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> int:
        with self._changed:
            target = self._written
            self._hurried += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._shipped >= target, timeout_s)
            self._hurried -= 1
            return self._written - self._shipped

    def close(self, timeout_s: float) -> int:
        with self._changed:
            self._deadline = time.monotonic() + timeout_s
            self._changed.notify_all()
        self.join(timeout_s + 1)
        return self._written - self._shipped

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._written > self._shipped or self._closing)
                if self._closing and (self._written == self._shipped or self._in_vain()):
                    return
            try:
                self._gather()
                self._work()
            except Exception as error:  # noqa: BLE001 - the thread lives as long as the process
                self._after_failure(error)

    @property
    def _closing(self) -> bool:
        return self._deadline is not None

    def _in_vain(self) -> bool:
        """Whether who closes need not wait: the time is up, or there is no server to send to."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return late or (self._failures > 0 and self._where() is None)

    def _where(self) -> str | None:
        return self._address if isinstance(self._address, str) else self._address()

    def _gather(self) -> None:
        """Rest while records come, unless somebody waits. What says that a run ended is on the disk
        a second later: training waits for no disk, and MLflow may be far behind."""
        now = time.monotonic()
        rest_s = min(_REST * self._sending_s, _REST_SHARE * (now - self._began), _LONGEST_REST_S)
        until = now + max(self._gather_s, rest_s)
        over = False
        while not over:
            with self._changed:
                left_s = min(self._gather_s, until - time.monotonic())
                self._changed.wait_for(lambda: self._hurried or self._closing, left_s)
                over = self._hurried > 0 or self._closing
                due, self._sync_due = self._sync_due, False
            if due:
                self._journal.sync()
            over = over or time.monotonic() >= until

    def _work(self) -> None:
        chunk = self._journal.read(self._offset)
        if chunk.end == self._offset:
            raise OSError(f"{self._journal.path} must hold what was written, but was cut short")
        began = time.monotonic()
        files = self._connected().ship(chunk.records)
        self._sending_s = time.monotonic() - began
        self._journal.set_offset(chunk.end)
        self._journal.drop(files)
        if self._failures:
            _log.info("MLflow answers again")
        self._failures = 0
        self.problem = ""
        with self._changed:
            self._offset = chunk.end
            self._shipped += len(chunk.records)
            if self._shipped == self._written and self._offset > _RESTART_BYTES:
                self._journal.restart()
                self._offset = 0
            self._changed.notify_all()

    def _connected(self) -> Shipper:
        address = self._where()
        if address is None:
            raise TrackerUnreachableError("no MLflow server is running")
        if self._shipper is None or self._shipper[0] != address:
            folder = self._journal.path.parent
            self._shipper = (
                address,
                Shipper(
                    address,
                    folder,
                    set_aside=self._journal.set_aside,
                    on_run_id=self._on_run_id,
                ),
            )
        return self._shipper[1]

    def _after_failure(self, error: Exception) -> None:
        self._failures += 1
        self.problem = str(error)
        if self._failures == 1:
            _log.warning("MLflow is out of reach, measurements wait in the spool: %s", error)
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures - 1, 10))
        pause_s *= random.uniform(0.5, 1)  # so that many workers do not come back at once
        with self._changed:
            if self._hurried or self._closing:
                self._changed.wait_for(lambda: False, min(pause_s, _FIRST_PAUSE_S))
            else:
                self._changed.wait_for(lambda: self._hurried or self._closing, pause_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What :func:`replay` did: records that arrived, that the server refused, that are left (with
    the problem), lines that a killed process left unfinished, and journals whose process lives."""

    delivered: int = 0
    rejected: int = 0
    left: int = 0
    torn: int = 0
    live: int = 0
    problem: str | None = None


def replay(
    folder: Path,
    tracking_uri: str,
    *,
    on_run_id: RunIdCallback | None = None,
    refused_too: bool = False,
) -> Replayed:
    """Send what processes that are gone left in the spool ``folder``, and delete their journals.

    With ``refused_too`` also what the server refused before: it may take it now.
    Safe beside live workers and beside another replay: a journal belongs to who has its lock.
    """
    sent = _replay(folder, tracking_uri, on_run_id)
    if not refused_too or sent.problem:
        return sent
    reopen(folder)
    again = _replay(folder, tracking_uri, on_run_id)
    return replace(again, delivered=sent.delivered + again.delivered, torn=sent.torn + again.torn)


def _replay(folder: Path, tracking_uri: str, on_run_id: RunIdCallback | None) -> Replayed:
    delivered = rejected = left = torn = live = 0
    problem: str | None = None
    for path in left_behind(folder):
        with claimed(path) as journal:
            if journal is None:
                live += path.exists()
                continue
            shipper = Shipper(
                tracking_uri, folder, set_aside=journal.set_aside, on_run_id=on_run_id
            )
            offset = journal.offset()
            while (chunk := journal.read(offset)).end > offset:
                torn += chunk.torn
                if problem is None:
                    problem = _insist(shipper, journal, chunk.records, chunk.end)
                if problem is None:
                    delivered += len(chunk.records)
                else:
                    left += len(chunk.records)
                offset = chunk.end
            torn += path.stat().st_size > offset
            rejected += shipper.rejected
            if problem is None:
                journal.remove()
    return Replayed(
        delivered=delivered, rejected=rejected, left=left, torn=torn, live=live, problem=problem
    )


def _insist(
    shipper: Shipper, journal: JournalFiles, records: tuple[Record, ...], end: int
) -> str | None:
    """Send records and note it; the problem that prevents it, if any."""
    for attempt in range(PATIENCE + 1):
        try:
            files = shipper.ship(records)
        except ServerFailedError as error:
            if attempt == PATIENCE:
                return str(error)
            time.sleep(_FIRST_PAUSE_S)
        except TrackerUnreachableError as error:
            return str(error)
        else:
            journal.set_offset(end)
            journal.drop(files)
            return None
    return None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

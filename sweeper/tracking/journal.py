"""The journal of one process: an append-only file of records, and how much of it has been sent.

Files of a journal ``NAME`` in the spool folder:

======================== ======================================================================
``NAME.jsonl``           the records, one a line; its writer holds a lock on it while it lives
``NAME.shipped``         how many bytes of it have arrived at the server
``NAME.files/…/``        the artifacts of the records, copied
``NAME.rejected.jsonl``  what the server refuses, with the reason; kept for people, and sent again
                         when they ask for it
======================== ======================================================================

A record is written with one call and without a buffer, so a killed process loses at most the line
it was writing; such a torn line is passed over. The lock is the kernel's (``flock``), so it ends
with its process, however that ends. On a file system without such locks a journal counts as left
behind once nobody has written to it for an hour.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sweeper.private import private_file, private_folder, private_opener
from sweeper.tracking import records
from sweeper.tracking.records import Record

_SUFFIX: Final = ".jsonl"
_REJECTED: Final = ".rejected.jsonl"
_BLOCK_BYTES: Final = 1 << 20
_ABANDONED_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Records read in one go. ``end`` is the byte after them, ``torn`` counts unreadable lines."""

    records: tuple[Record, ...]
    end: int
    torn: int


class JournalFiles:
    """The names of a journal's files, and what reader and writer have in common."""

    def __init__(self, path: Path) -> None:
        stem = path.name.removesuffix(_SUFFIX)
        self.path = path
        self.shipped_file = path.with_name(f"{stem}.shipped")
        self.rejected_file = path.with_name(f"{stem}{_REJECTED}")
        self.files = path.with_name(f"{stem}.files")

    def offset(self) -> int:
        """How many bytes have arrived at the server."""
        try:
            offset = int(self.shipped_file.read_text())
            return offset if 0 <= offset <= self.path.stat().st_size else 0
        except (OSError, ValueError):
            return 0

    def set_offset(self, offset: int) -> None:
        temporary = self.shipped_file.with_suffix(".shipped.tmp")
        with open(temporary, "w", encoding="utf-8", opener=private_opener) as stream:
            stream.write(str(offset))
        temporary.replace(self.shipped_file)

    def read(self, offset: int) -> Chunk:
        """Complete lines from ``offset`` on, about a mebibyte of them."""
        with self.path.open("rb") as stream:
            stream.seek(offset)
            block = stream.read(_BLOCK_BYTES)
            if block and b"\n" not in block:
                block += stream.readline()
        block = block[: block.rfind(b"\n") + 1]
        found, torn = [], 0
        for line in block.split(b"\n"):
            if not line:
                continue
            try:
                found.append(Record.parse(line))
            except ValueError:
                torn += 1
        return Chunk(records=tuple(found), end=offset + len(block), torn=torn)

    def set_aside(self, refused: Mapping[str, Any]) -> None:
        """Keep what the server refuses, for people to look at and :func:`reopen` to send again."""
        with open(self.rejected_file, "a", encoding="utf-8", opener=private_opener) as stream:
            stream.write(json.dumps(refused) + "\n")

    def remove(self) -> None:
        """Delete the journal; refused records, and the artifacts they name, stay."""
        self.path.unlink(missing_ok=True)
        self.shipped_file.unlink(missing_ok=True)
        if not self.rejected_file.exists():
            shutil.rmtree(self.files, ignore_errors=True)

    @staticmethod
    def drop(files: Iterable[Path]) -> None:
        """Delete artifacts that have arrived."""
        for file in files:
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                file.parent.rmdir()
                file.parent.parent.rmdir()


class Journal(JournalFiles):
    """The writing end. One process has one; ``append`` is not safe for several threads."""

    def __init__(self, folder: Path, writer: str) -> None:
        name = re.sub(r"[^\w.-]", "_", writer)[:80]
        super().__init__(folder / f"{name}-{uuid.uuid4().hex[:8]}{_SUFFIX}")
        self._descriptor: int | None = None
        self._closed = False
        self._torn = False

    def append(self, record: Record) -> None:
        """Write one record. Raises OSError where the disk does not take it."""
        descriptor = self._opened()
        line = b"\n" * self._torn + record.line()  # first end the line that the disk cut off
        self._torn = True
        if os.write(descriptor, line) < len(line):
            raise OSError(f"{self.path}: the disk took only a part of a record")
        self._torn = False

    def keep_file(self, file: Path) -> str:
        """Copy ``file`` into the spool; its path relative to the spool folder."""
        folder = self.files / uuid.uuid4().hex
        private_folder(folder)
        copy = folder / file.name
        private_file(copy)
        shutil.copyfile(file, copy)
        return copy.relative_to(self.path.parent).as_posix()

    def sync(self) -> None:
        """Have the kernel put on disk what was written."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def restart(self) -> None:
        """Empty the journal; only for one that has been sent to its end."""
        if self._descriptor is not None:
            self.set_offset(0)  # in this order: a crash between the two repeats, and loses nothing
            os.ftruncate(self._descriptor, 0)

    def close(self) -> None:
        """Close the file, which gives the lock up. There is no writing after that."""
        self._closed = True
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        if self._descriptor is not None:
            return self._descriptor
        if self._closed:
            raise ValueError("a tracker must not be used once it is closed")
        private_folder(self.path.parent)
        hidden = self.path.with_suffix(".new")  # nobody must see the journal before it is locked
        flags = os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_RDWR
        descriptor = private_opener(str(hidden), flags)
        lock(descriptor)
        hidden.rename(self.path)
        self._descriptor = descriptor
        return descriptor


def lock(descriptor: int, *, wait: bool = True) -> bool | None:
    """Lock an open file for this process: True, or False if another has it (``wait=False``), or
    None on a file system that knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def left_behind(folder: Path) -> list[Path]:
    """The journals in the spool folder, the oldest first."""
    paths = [path for path in folder.glob(f"*{_SUFFIX}") if not path.name.endswith(_REJECTED)]
    with contextlib.suppress(FileNotFoundError):
        paths.sort(key=lambda path: path.stat().st_mtime)
    return paths


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A file of what the server refused: how many lines it has, of which experiments, and the
    reason of the first."""

    path: Path
    count: int
    experiments: frozenset[str]
    reason: str

    def told(self) -> str:
        """What people are to know of it."""
        return (
            f"MLflow refused {self.count} records ({self.reason}); they are kept in {self.path}, "
            "and sent once more with: sweeper sync"
        )


def refused(folder: Path) -> list[Refused]:
    """What the server refused of the journals in the spool folder, file by file."""
    found = []
    for path in sorted(folder.glob(f"*{_REJECTED}")):
        lines = []
        with contextlib.suppress(FileNotFoundError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        entries = []
        for line in lines:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        if lines:
            found.append(
                Refused(
                    path=path,
                    count=len(lines),
                    experiments=frozenset(str(entry.get("experiment")) for entry in entries),
                    reason=str(entries[0].get("reason", "")) if entries else "",
                )
            )
    return found


def reopen(folder: Path) -> None:
    """Make what the server refused a journal again, where the one that it comes from is done with.

    What it refuses once more is set aside once more.
    """
    for path in folder.glob(f"*{_REJECTED}"):
        with claimed(path) as mine:
            journal = JournalFiles(path.with_name(path.name.removesuffix(_REJECTED) + _SUFFIX))
            if mine is None or journal.path.exists():
                continue
            unknown_ms = int(path.stat().st_mtime * 1000)
            journal.shipped_file.unlink(missing_ok=True)
            hidden = journal.path.with_suffix(".new")
            with open(hidden, "wb", opener=private_opener) as stream:
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    with contextlib.suppress(ValueError):  # a line that a killed process cut off
                        for record in records.refused(line, unknown_ms):
                            stream.write(record.line())
            hidden.replace(journal.path)
            path.unlink()


def pending(folder: Path) -> tuple[int, int]:
    """How many journals of the spool folder hold something unsent, and how many bytes in all."""
    sizes = []
    for path in left_behind(folder):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size - JournalFiles(path).offset())
    unsent = [size for size in sizes if size > 0]
    return len(unsent), sum(unsent)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[JournalFiles | None]:
    """The journal of a process that is gone, locked; None while somebody else has it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    try:
        mine = lock(descriptor, wait=False)
        if mine is None:
            mine = time.time() - os.fstat(descriptor).st_mtime > _ABANDONED_S
        still_there = path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino
        yield JournalFiles(path) if mine and still_there else None
    finally:
        os.close(descriptor)

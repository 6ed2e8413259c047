"""Files fetched once for all workers of a machine, or a clear word on what is missing.

torchvision knows addresses and checksums. The transfer is ours, because torchvision's has no
time-out (an offline worker hangs for minutes), writes under the final name (a killed worker leaves
half a file that the next one takes for whole), and draws progress bars into logs.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Final
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock

from sweeper.errors import DataNotFoundError

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S: Final = 10.0
"""How long one server may take to answer. No data set has more than two mirrors, and the first
file that no mirror has ends the attempt: an offline machine is told so within half a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file with its MD5 sum and the addresses that serve it, the best one first."""

    name: str
    md5: str
    urls: tuple[str, ...]


def provide(
    files: Callable[[], Iterable[RemoteFile]],
    into: Path,
    *,
    name: str,
    complete: Callable[[], bool],
    unpack: Callable[[], None] = lambda: None,
    advice: str,
) -> None:
    """Fetch ``files()`` into the folder ``into`` and ``unpack()`` them, unless ``complete()``.

    One process fetches, under a lock next to the data, while the others wait. A process that
    waited for an attempt that failed fails with it, instead of trying the same again: otherwise
    many workers of an offline machine would time out one after the other. A file that is there
    with the right checksum is not fetched again.

    Raises DataNotFoundError with ``advice`` (what to put where) and the reason.
    """
    started = time.time()
    failure = into / f".{name}.failed"
    if complete():
        return
    try:
        into.mkdir(parents=True, exist_ok=True)
        with FileLock(into / f".{name}.lock"):
            if complete():
                return
            if failure.exists() and failure.stat().st_mtime >= started:
                raise OSError(failure.read_text())
            try:
                for file in files():
                    _fetch(file, into / file.name)
                unpack()
            except (OSError, HTTPException) as error:
                failure.write_text(str(error))
                raise
            failure.unlink(missing_ok=True)
    except (OSError, HTTPException) as error:
        raise DataNotFoundError(f"{advice} Downloading failed: {error}") from error


def _fetch(file: RemoteFile, target: Path) -> None:
    """Put ``file`` at ``target`` from the first address that has it. Raises OSError."""
    failures = []
    if target.exists():
        found = _md5(target)
        if found == file.md5:
            return
        failures.append(f"{target}: {_wrong_checksum(file.md5, found)}")
    for url in file.urls:
        try:
            _transfer(url, target, file.md5)
        except (OSError, HTTPException) as error:
            failures.append(f"{url}: {error}")
        else:
            return
    raise OSError("; ".join(failures))


def _transfer(url: str, target: Path, md5: str) -> None:
    logger.info("downloading %s to %s", url, target)
    with _opened(url) as response, replacing(target) as file:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := response.read(1 << 20):
            file.write(chunk)
            digest.update(chunk)
        if digest.hexdigest() != md5:
            raise OSError(_wrong_checksum(md5, digest.hexdigest()))


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    """The body of ``url``, once its server answers within :data:`ANSWER_TIMEOUT_S`.

    In a thread, because the time-out of a socket bounds every wait except for the name look-up.
    """
    answer: queue.Queue[IO[bytes] | Exception] = queue.Queue()

    def open_url() -> None:
        try:
            request = Request(url, headers={"User-Agent": "sweeper"})
            answer.put(urlopen(request, timeout=ANSWER_TIMEOUT_S))
        except Exception as error:  # noqa: BLE001 - handed to the waiting thread, which raises it
            answer.put(error)

    threading.Thread(target=open_url, daemon=True).start()
    try:
        response = answer.get(timeout=ANSWER_TIMEOUT_S + 1)
    except queue.Empty:
        host = urlsplit(url).hostname
        raise TimeoutError(f"{host} did not answer within {ANSWER_TIMEOUT_S:g} s") from None
    if isinstance(response, Exception):
        try:
            raise response
        finally:
            del response  # its traceback knows this frame: a cycle that keeps the socket open
    with response:
        yield response


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``target`` when complete, and vanishes otherwise."""
    with NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            yield file
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _wrong_checksum(expected: str, found: str) -> str:
    return f"the MD5 checksum must be {expected}, but is {found}"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

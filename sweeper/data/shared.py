"""Tensors made once on a machine and mapped by every process that needs them.

A file is written by the first process that wants it, under a lock, to a temporary name, and is only
ever replaced as a whole. It is mapped copy-on-write: the pages are the page cache's, one copy for
all processes, and nothing that a process does to its tensors reaches the file. A file's name is a
digest of all that its content depends on, so what has changed has another name; a file that turns
out to be damaged is set aside and made anew.

The folder is bounded: whenever a file is written, those that nobody has opened for a day go, and
nothing is written that would make the folder larger than :data:`LIMIT_BYTES` or than a quarter of
the space that it and the free space make up together. Where nothing can be written, each process
makes its own, as if there were no such folder, and the log says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from sweeper.data.download import replacing

logger = logging.getLogger(__name__)

FORMAT: Final = 1
"""To be raised whenever the same key would mean another content."""

LIMIT_BYTES: Final = 16 * 2**30
"""The folder is never made larger than this."""

_SHARE: Final = 0.25
_IDLE_S: Final = 86_400.0
_WORD: Final = 8
"""Bytes of a word of the checksum."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """``tensors`` by name, on the CPU, and ``facts`` that are plain values.

    ``mapped``: whether the tensors are shared with other processes. ``new``: whether they were
    made just now, and by this process.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    mapped: bool = False
    new: bool = True

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(kw_only=True)
class SharedFolder:
    """The files of the data set called ``name`` in ``folder``, which is created when needed.

    After a failure it makes everything itself, so that the log has the reason once.
    """

    folder: Path
    name: str
    _failed: bool = False

    def get(
        self,
        kind: str,
        key: Mapping[str, Any],
        make: Callable[[], Content],
    ) -> Content:
        """The content that ``key`` stands for, mapped; as ``make`` made it, where it cannot be.

        ``key`` is all that the content depends on, as JSON has it. What ``make`` raises is raised
        on. One process makes a content while the others wait.
        """
        if self._failed:
            return make()
        whole = json.dumps({"format": FORMAT, "kind": kind, **key}, sort_keys=True)
        digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
        path = self.folder / f"{self.name}-{kind}-{digest}.pt"
        with ExitStack() as stack:
            try:
                if found := _mapped(path, whole):
                    return found
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self.folder / f".{self.name}.lock"))
                if found := _mapped(path, whole):
                    return found
            except (OSError, NotImplementedError) as error:  # the latter: a disk without locks
                self._give_up(error)
                return make()
            made = make()
            try:
                _write(path, whole, made)
                if written := _mapped(path, whole):
                    return replace(written, new=True)
                raise OSError(f"{path} is not what was written")
            except (OSError, RuntimeError) as error:  # the latter: torch, of a full disk
                self._give_up(error)
            return made

    def _give_up(self, why: Exception) -> None:
        self._failed = True
        logger.warning(
            "every worker keeps a copy of %s of its own, as %s cannot be shared: %s",
            *(self.name, self.folder, why),
        )


def usage(folder: Path) -> tuple[int, int]:
    """How many files there are in ``folder``, and their bytes."""
    sizes = [status.st_size for _, status in _files(folder)]
    return len(sizes), sum(sizes)


def _mapped(path: Path, key: str) -> Content | None:
    """The content of a file, or None where there is none or it is damaged.

    Raises OSError where it is there and may not be read.
    """
    try:
        stored = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - what is damaged may raise anything
        logger.debug("%s cannot be read: %s", path, error)
        return None
    try:
        tensors, facts = stored["tensors"], stored["facts"]
        sound = stored["key"] == key and stored["checksums"] == _checksums(tensors)
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError):
        return None
    if not sound:
        return None
    with suppress(OSError):  # of another user, or on a disk that is only read
        os.utime(path)
    return Content(tensors=tensors, facts=facts, mapped=True, new=False)


def _write(path: Path, key: str, content: Content) -> None:
    """Raises OSError, or RuntimeError from torch, where there is no room for it."""
    if path.exists():
        aside = path.with_suffix(".damaged")
        logger.warning("%s is damaged: it is set aside as %s, and made anew", path, aside.name)
        path.replace(aside)
    _make_room(path.parent, content.nbytes)
    tensors = {name: _alone(tensor) for name, tensor in content.tensors.items()}
    stored = {
        "key": key,
        "tensors": tensors,
        "facts": dict(content.facts),
        "checksums": _checksums(tensors),
    }
    with replacing(path) as file:
        torch.save(stored, file)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: a storage is saved as a whole."""
    whole = tensor.contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def _make_room(folder: Path, nbytes: int) -> None:
    """Delete what nobody has opened for a day. Raises OSError where there is still no room.

    A file that is mapped lives on until nobody has it.
    """
    now = time.time()
    used = 0
    for file, status in _files(folder):
        used += status.st_size
        if now - status.st_mtime > _IDLE_S:
            with suppress(OSError):  # another user's
                file.unlink()
                used -= status.st_size
    bound = min(LIMIT_BYTES, int(_SHARE * (used + shutil.disk_usage(folder).free)))
    if used + nbytes > bound:
        raise OSError(
            f"it may take {bound / 2**30:.1f} GiB, but {used / 2**30:.1f} GiB are in use and "
            f"{nbytes / 2**30:.1f} GiB are wanted; free some space, or delete what is in there"
        )


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All of them: what is set aside and what a killed process left as well. No locks."""
    for file in folder.glob("*"):
        if not file.name.endswith(".lock"):
            with suppress(FileNotFoundError):
                yield file, file.stat()


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """An exclusive or over each tensor: at the speed of memory (0.1 ms a MiB), it finds a page of
    zeros, as a power cut leaves it, and a changed bit."""
    return {name: _checksum(tensor) for name, tensor in tensors.items()}


def _checksum(tensor: Tensor) -> str:
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    words, rest = np.split(content, [len(content) // _WORD * _WORD])
    parity = int(np.bitwise_xor.reduce(words.view(np.uint64)))
    return f"{tensor.dtype} {list(tensor.shape)} {parity:016x} {rest.tobytes().hex()}"

"""Checkpoints: what a trial needs to go on elsewhere after its last finished epoch.

``PLACE/STUDY/NUMBER/epoch-000012.ckpt``, where PLACE is a folder or an fsspec URL, STUDY tells two
studies of one name apart, and NUMBER is that of the trial's first attempt. A file is one line with
a format number, the digest of the trial's configuration and a checksum (torch does not verify its
own), and then what ``torch.save`` writes. It is written to a temporary name and renamed, by a
thread, and the last two are kept. Reading executes nothing: ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sweeper.config import TrialConfig
from sweeper.errors import MissingExtraError, OutOfReachError, UsageError
from sweeper.measurement import Measurement
from sweeper.private import private_folder, private_opener, there

if TYPE_CHECKING:  # torch and fsspec are loaded once something is read or written
    from fsspec import AbstractFileSystem

    from sweeper.training import Trial

_log = logging.getLogger(__name__)
_MAGIC: Final = "sweeper-checkpoint-1"
_NAME: Final = re.compile(r"epoch-(\d{6,})\.ckpt")
_KEPT: Final = 2
_SHARE: Final = 0.01
"""At most this share of the time may go into copying a trial's state to the host."""
_ABANDONED_S: Final = 30 * 86400.0
_STUDY: Final = re.compile(r".+-[0-9a-f]{8}")
_OURS: Final = re.compile(r"\d{6,}/epoch-\d{6,}\.ckpt(\.damaged|\.[0-9a-f]{8}\.tmp)?")
"""What there may be in a study's folder, and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """A finished epoch, and when it was measured in milliseconds since 1970."""

    measurement: Measurement
    time_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A trial after its last finished epoch.

    ``training`` is :meth:`Trial.state_dict`; ``epochs`` are all epochs so far, ``seconds`` of
    wall time all attempts took for them.
    """

    training: Mapping[str, Any]
    epochs: tuple[Epoch, ...]
    seconds: float


def digest(config: TrialConfig, objective: tuple[str, bool]) -> str:
    """A short text that two trials share if one can go on from a checkpoint of the other."""
    text = f"{config.model_dump_json()} {objective}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class DamagedCheckpointError(Exception):
    """The file is not a whole checkpoint."""


class TrialCheckpoints:
    """The checkpoints of one trial. Nothing here raises because of the place they are kept in."""

    def __init__(
        self, place: str, study: str, number: int, *, digest: str, every: int, at_most_s: float
    ) -> None:
        self._folder = _Folder(f"{place}/{study}/{number:06d}")
        self._digest = digest
        self._every = every
        self._at_most_s = at_most_s
        self._not_before = time.monotonic() + at_most_s
        self._writing: threading.Thread | None = None

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and of this configuration, or None.

        A damaged one is renamed to ``*.damaged`` with a warning, and the one before is read.
        """
        if not self._every:
            return None
        try:
            names = self._folder.names()
        except Exception as error:  # noqa: BLE001 - file systems of all kinds, and their errors
            _log.warning("checkpoints in %s cannot be read: %s", self._folder, error)
            return None
        for name in sorted(filter(_NAME.fullmatch, names), reverse=True):
            try:
                found = _unpacked(self._folder.read(name), self._digest)
            except DamagedCheckpointError as error:
                self._damaged(name, str(error))
            except Exception as error:  # noqa: BLE001 - as above
                _log.warning("the checkpoint %s/%s cannot be read: %s", self._folder, name, error)
            else:
                if found is not None:
                    return found
        return None

    def set_aside(self, checkpoint: Checkpoint, why: str) -> bool:
        """Rename one that cannot be used, with a warning; whether that is done."""
        return self._damaged(_name(checkpoint), why)

    def due(self, epoch: int) -> bool:
        """Whether a checkpoint after ``epoch`` is wanted and the one before is written."""
        return (
            bool(self._every)
            and epoch % self._every == 0
            and time.monotonic() >= self._not_before
            and not (self._writing is not None and self._writing.is_alive())
        )

    def write(self, training: Trial, epochs: Sequence[Epoch], seconds: float) -> None:
        """Copy the trial's state now, and write it in the background.

        Waits for the checkpoint before this one: ask :meth:`due` first where that matters.
        """
        if not self._every or not epochs:
            return
        began = time.monotonic()
        state = training.state_dict()
        took_s = time.monotonic() - began
        self._not_before = began + max(self._at_most_s, took_s / _SHARE)
        if not state:
            return
        self.wait()
        kept = Checkpoint(training=state, epochs=tuple(epochs), seconds=seconds)
        self._writing = threading.Thread(
            target=self._write, args=(kept,), name="checkpoint", daemon=True
        )
        self._writing.start()

    def wait(self, timeout_s: float = 300.0) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writing is not None:
            self._writing.join(timeout_s)

    def delete(self) -> None:
        """Remove all checkpoints of the trial."""
        self.wait()
        self._quietly(self._folder.remove)

    def _write(self, checkpoint: Checkpoint) -> None:
        name = _name(checkpoint)
        try:
            self._folder.write(name, _packed(checkpoint, self._digest))
            older = sorted(filter(_NAME.fullmatch, self._folder.names()), reverse=True)
            for old in older[_KEPT:]:
                self._folder.drop(old)
        except Exception as error:  # noqa: BLE001 - a full disk must not cost the trial
            _log.warning("the checkpoint %s/%s is not written: %s", self._folder, name, error)

    def _damaged(self, name: str, why: str) -> bool:
        _log.warning("the checkpoint %s/%s is set aside: %s", self._folder, name, why)
        return self._quietly(lambda: self._folder.rename(name, f"{name}.damaged"))

    def _quietly(self, act: Callable[[], object]) -> bool:
        try:
            act()
        except FileNotFoundError:
            pass
        except Exception as error:  # noqa: BLE001 - what is left is swept with its study
            _log.warning("the checkpoints in %s stay as they are: %s", self._folder, error)
            return False
        return True


def _name(checkpoint: Checkpoint) -> str:
    return f"epoch-{checkpoint.epochs[-1].measurement.epoch:06d}.ckpt"


def refuse_unusable(place: str) -> None:
    """Raise where no checkpoint can be written to ``place``: training goes on without any.

    Raises:
        UsageError: fsspec knows no such place, or a file is where the folder should be.
        MissingExtraError: what the place needs is not installed.
        OutOfReachError: the folder is read-only, or somebody else's.
    """
    _Folder(place).refuse_unusable()


def remove_study(place: str, study: str) -> None:
    """Remove what is left of a study that is over, and of those that were abandoned: nothing in
    their folders was written for 30 days. A folder with anything but checkpoints in it is somebody
    else's and stays, for the place may have other uses.
    """
    try:
        _Folder(f"{place}/{study}").remove()
        for name in filter(_STUDY.fullmatch, _Folder(place).names()):
            folder = _Folder(f"{place}/{name}")
            if _is_abandoned(folder):
                folder.remove()
    except FileNotFoundError:
        return
    except Exception as error:  # noqa: BLE001 - file systems of all kinds, and their errors
        _log.warning("old checkpoints in %s cannot be removed: %s", place, error)


def _is_abandoned(folder: _Folder) -> bool:
    files = folder.files()
    if not files or not all(map(_OURS.fullmatch, files)):
        return False
    return all(time.time() - folder.changed(file) > _ABANDONED_S for file in files)


def _packed(checkpoint: Checkpoint, digest: str) -> bytes:
    import torch

    stream = io.BytesIO()
    content = {
        "training": dict(checkpoint.training),
        "epochs": [
            {
                "epoch": epoch.measurement.epoch,
                "metrics": {name: float(v) for name, v in epoch.measurement.metrics.items()},
                "time_ms": epoch.time_ms,
            }
            for epoch in checkpoint.epochs
        ],
        "seconds": float(checkpoint.seconds),
    }
    torch.save(content, stream)
    body = stream.getvalue()
    return f"{_MAGIC} {digest} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def _unpacked(content: bytes, digest: str) -> Checkpoint | None:
    """The checkpoint, or None for one of another configuration."""
    import torch

    header, _, body = content.partition(b"\n")
    words = header[:200].decode(errors="replace").split()
    if len(words) != 3 or words[0] != _MAGIC:
        raise DamagedCheckpointError("it does not begin as a checkpoint does")
    if words[2] != hashlib.sha256(body).hexdigest():
        raise DamagedCheckpointError("its checksum is wrong")
    if words[1] != digest:
        return None
    try:
        found = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        return Checkpoint(
            training=found["training"],
            epochs=tuple(
                Epoch(
                    measurement=Measurement(epoch=epoch["epoch"], metrics=epoch["metrics"]),
                    time_ms=epoch["time_ms"],
                )
                for epoch in found["epochs"]
            ),
            seconds=found["seconds"],
        )
    except Exception as error:
        raise DamagedCheckpointError(f"torch cannot read it: {error}") from error


class _Folder:
    """A folder anywhere; a local one without fsspec's detours. Errors are the file system's."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._local = None if "://" in url else Path(url)
        self._opened: tuple[AbstractFileSystem, str] | None = None

    def __str__(self) -> str:
        return self._url.rpartition("@")[2]  # without what may be a password

    @property
    def _remote(self) -> tuple[AbstractFileSystem, str]:
        if self._opened is None:
            from fsspec.core import url_to_fs

            system, path = url_to_fs(self._url)
            self._opened = system, path.rstrip("/")
        return self._opened

    def refuse_unusable(self) -> None:
        what = f"checkpoints must be kept where SWEEPER_CHECKPOINTS says, {self}"
        if self._local is not None:
            found = there(self._local)
            if not found.is_dir():
                raise UsageError(f"{what}, but {found} is not a folder")
            if not os.access(found, os.W_OK | os.X_OK):
                raise OutOfReachError(f"{what}, but {found} is read-only or somebody else's")
            return
        try:
            _ = self._remote
        except ImportError as error:
            raise MissingExtraError(f"{what}, but a package is missing: {error}") from error
        except ValueError as error:
            raise UsageError(f"{what}, but: {error}") from error

    def names(self) -> list[str]:
        if self._local is not None:
            return [entry.name for entry in self._local.iterdir()] if self._local.exists() else []
        system, path = self._remote
        system.invalidate_cache()
        if not system.exists(path):
            return []
        return [str(entry).rstrip("/").rpartition("/")[2] for entry in system.ls(path, False)]

    def files(self) -> list[str]:
        """The paths of all files in the folder and below it; links are files."""
        if self._local is not None:
            return [
                (Path(root) / name).relative_to(self._local).as_posix()
                for root, folders, files in os.walk(self._local)
                for name in [
                    *files,
                    *(each for each in folders if (Path(root) / each).is_symlink()),
                ]
            ]
        system, path = self._remote
        system.invalidate_cache()
        return [str(file).removeprefix(path).lstrip("/") for file in system.find(path)]

    def read(self, name: str) -> bytes:
        if self._local is not None:
            return (self._local / name).read_bytes()
        system, path = self._remote
        return bytes(system.cat_file(f"{path}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Write the file whole or not at all."""
        temporary = f"{name}.{uuid.uuid4().hex[:8]}.tmp"
        if self._local is not None:
            private_folder(self._local)
            with open(self._local / temporary, "xb", opener=private_opener) as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            (self._local / temporary).replace(self._local / name)
            return
        system, path = self._remote
        system.makedirs(path, exist_ok=True)
        system.pipe_file(f"{path}/{temporary}", content)
        system.mv(f"{path}/{temporary}", f"{path}/{name}")

    def rename(self, name: str, to: str) -> None:
        if self._local is not None:
            (self._local / name).replace(self._local / to)
            return
        system, path = self._remote
        system.mv(f"{path}/{name}", f"{path}/{to}")

    def drop(self, name: str) -> None:
        if self._local is not None:
            (self._local / name).unlink(missing_ok=True)
            return
        system, path = self._remote
        system.rm_file(f"{path}/{name}")

    def remove(self) -> None:
        """The folder with all that is in it."""
        if self._local is not None:
            import shutil

            if self._local.exists():
                shutil.rmtree(self._local)
            return
        system, path = self._remote
        system.invalidate_cache()
        if system.exists(path):
            system.rm(path, recursive=True)

    def changed(self, name: str) -> float:
        """When a file was last changed, in seconds since 1970; now where nobody knows."""
        if self._local is not None:
            return (self._local / name).stat().st_mtime
        system, path = self._remote
        try:
            return float(system.modified(f"{path}/{name}").timestamp())
        except Exception:  # noqa: BLE001 - not every file system can tell
            return time.time()

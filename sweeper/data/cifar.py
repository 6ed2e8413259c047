"""CIFAR-10 in torchvision's layout, ``<folder>/cifar-10-batches-py``, read by torchvision.

torchvision compares every file with its checksum before it unpickles it.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import numpy as np

from sweeper.config.data import Cifar10
from sweeper.data.download import RemoteFile, provide
from sweeper.data.raw import Origin, RawData, RawPart, digest_of
from sweeper.errors import DataNotFoundError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

_FOLDER: Final = "cifar-10-batches-py"
_ARCHIVE: Final = "cifar-10-python.tar.gz"
_BATCHES: Final = (
    *(f"data_batch_{number}" for number in range(1, 6)),
    *("test_batch", "batches.meta"),
)
"""torchvision's names, which takes a second to load: shared data do without it."""


def cifar10(config: Cifar10, folder: Path) -> RawData:
    """uint8 ``[N, 3, 32, 32]`` from the Python version of CIFAR-10, downloaded if missing.

    An archive that is already in ``folder`` is unpacked. Raises DataNotFoundError where there is
    neither and no download, or where a file is damaged (it is named).
    """
    from torchvision.datasets import CIFAR10  # slow to load; only where it is used

    batches = _provided(config, folder)
    archive = folder / _ARCHIVE
    try:
        train, test = CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    except RuntimeError as error:
        raise DataNotFoundError(
            f"{_unsound(batches)}. Delete {batches}, and run again to download it or put "
            f"{archive.name} into {folder}."
        ) from error
    return RawData(
        train=_part(train), test=_part(test), classes=tuple(train.classes), source=str(batches)
    )


def cifar10_origin(config: Cifar10, folder: Path) -> Origin:
    """The batches, which are downloaded if missing. Raises as :func:`cifar10` does."""
    batches = _provided(config, folder)
    digest = digest_of(batches / name for name in _BATCHES)
    return Origin(digest=digest, read=lambda: cifar10(config, folder))


def _provided(config: Cifar10, folder: Path) -> Path:
    """The folder of the batches, which is there. Raises DataNotFoundError otherwise."""
    batches, archive = folder / _FOLDER, folder / _ARCHIVE
    provide(
        _remote_files,
        folder,
        name=config.name,
        complete=batches.is_dir,
        unpack=lambda: _unpack(archive, batches),
        advice=(
            f"Data set {config.name!r} must be in {batches}, but that folder is not there. Put "
            f"{archive.name} into {folder}, or set SWEEPER_DATA to a data folder that has it, or "
            f"train on your own pictures with data.name: image_folder."
        ),
    )
    return batches


def _remote_files() -> list[RemoteFile]:
    """What torchvision knows about the archive."""
    from torchvision.datasets import CIFAR10  # slow to load; only where it is used

    return [RemoteFile(name=_ARCHIVE, md5=CIFAR10.tgz_md5, urls=(CIFAR10.url,))]


def _unpack(archive: Path, batches: Path) -> None:
    """All of the archive, whose checksum is known to be right, or nothing."""
    with (
        TemporaryDirectory(dir=batches.parent, prefix=f".{batches.name}.") as temporary,
        tarfile.open(archive) as file,
    ):
        file.extractall(temporary, filter="data")
        (Path(temporary) / batches.name).replace(batches)


def _unsound(batches: Path) -> str:
    """What is wrong with a folder that torchvision refuses."""
    from torchvision.datasets import CIFAR10  # slow to load; only where it is used

    expected = [*CIFAR10.train_list, *CIFAR10.test_list]
    expected.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
    for name, md5 in expected:
        path = batches / name
        if not path.is_file():
            return f"{path} must be there, but is missing"
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            return f"{path} is damaged: its MD5 checksum must be {md5}"
    return f"{batches} cannot be read"


def _part(part: CIFAR10) -> RawPart:
    images_NHWC = part.data
    return RawPart(
        images=np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)),
        labels=np.asarray(part.targets, dtype=np.int64),
    )

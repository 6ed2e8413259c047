"""MNIST, Fashion-MNIST and KMNIST: four IDX files in torchvision's layout, ``<folder>/<Name>/raw``.

The files are read here and not by torchvision, which takes any file of the right name for whole,
wants them unpacked, and leaves a damaged one to fail as a ``struct`` or ``assert`` error. Addresses
and checksums for a download are torchvision's.

Format (http://yann.lecun.com/exdb/mnist): big-endian; two zero bytes, a type (8: uint8), the
number of dimensions, each dimension as uint32, then the values.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from sweeper.config.data import FashionMnist, Kmnist, Mnist, source_shape
from sweeper.data.download import RemoteFile, provide
from sweeper.data.raw import Images, Origin, RawData, RawPart, digest_of
from sweeper.errors import DataNotFoundError

_UINT8: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """A data set's class in ``torchvision.datasets``, which is its folder as well."""

    name: str
    classes: tuple[str, ...]


_FAMILIES: Final = {
    "mnist": _Family(name="MNIST", classes=tuple("0123456789")),
    "fashion_mnist": _Family(
        name="FashionMNIST",
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
    "kmnist": _Family(
        name="KMNIST", classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    ),
}

_FILES: Final = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(config: Mnist | FashionMnist | Kmnist, folder: Path) -> RawData:
    """uint8 ``[N, 1, 28, 28]`` from the files under ``folder``, which are downloaded if missing.

    Each file may be there as it is or with ``.gz``. Raises DataNotFoundError where files are
    missing and cannot be fetched, or where one is damaged (it is named).
    """
    family, raw = _provided(config, folder)
    return RawData(
        train=_part(raw, "train", config),
        test=_part(raw, "t10k", config),
        classes=family.classes,
        source=str(raw),
    )


def idx_origin(config: Mnist | FashionMnist | Kmnist, folder: Path) -> Origin:
    """The four files, which are downloaded if missing. Raises as :func:`idx` does."""
    _, raw = _provided(config, folder)
    digest = digest_of(_stored(raw, name) for name in _FILES)
    return Origin(digest=digest, read=lambda: idx(config, folder))


def _provided(config: Mnist | FashionMnist | Kmnist, folder: Path) -> tuple[_Family, Path]:
    """The folder of the files, all of which are there. Raises DataNotFoundError otherwise."""
    family = _FAMILIES[config.name]
    raw = folder / family.name / "raw"
    provide(
        lambda: _remote_files(family.name),
        raw,
        name=config.name,
        complete=lambda: all(_stored(raw, name).is_file() for name in _FILES),
        advice=_advice(config.name, raw),
    )
    return family, raw


def _advice(name: str, raw: Path) -> str:
    return (
        f"Data set {name!r} must be in {raw}, but not all of its files are there. Put "
        f"{', '.join(_FILES)} into that folder (as they are or with .gz), or set SWEEPER_DATA to a "
        f"data folder that has them in {raw.parent.name}/raw, or train on your own pictures with "
        f"data.name: image_folder."
    )


def _remote_files(name: str) -> list[RemoteFile]:
    """What torchvision knows about the origin of a data set."""
    from torchvision import datasets  # slow to load; only for a download

    origin = getattr(datasets, name)
    return [
        RemoteFile(name=file, md5=md5, urls=tuple(f"{mirror}{file}" for mirror in origin.mirrors))
        for file, md5 in origin.resources
    ]


def _stored(raw: Path, name: str) -> Path:
    """Where a file is, or would be: under its name, or packed."""
    plain, packed = raw / name, raw / f"{name}.gz"
    return packed if packed.is_file() and not plain.is_file() else plain


def _part(raw: Path, prefix: str, config: Mnist | FashionMnist | Kmnist) -> RawPart:
    """The images and labels of one part, checked against each other and the data set's shape."""
    images_file = _stored(raw, f"{prefix}-images-idx3-ubyte")
    labels_file = _stored(raw, f"{prefix}-labels-idx1-ubyte")
    images = _read(images_file, dimensions=3)
    labels = _read(labels_file, dimensions=1)
    shape = source_shape(config)
    if shape is not None and images.shape[1:] != (shape.height, shape.width):
        raise _damaged(
            images_file,
            f"images of {config.name} are {shape.height}x{shape.width}, "
            f"but these are {images.shape[1]}x{images.shape[2]}",
        )
    if len(images) != len(labels):
        raise _damaged(
            labels_file,
            f"there must be one label for each of the {len(images)} images of "
            f"{images_file.name}, but there are {len(labels)}",
        )
    if shape is not None and labels.max(initial=0) >= shape.classes:
        raise _damaged(
            labels_file, f"labels must be below {shape.classes}, but one is {labels.max()}"
        )
    return RawPart(images=images[:, None], labels=labels.astype(np.int64))


def _read(path: Path, *, dimensions: int) -> Images:
    """The array of an IDX file, whose header must say what its length is."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                content = np.frombuffer(bytearray(file.read()), dtype=np.uint8)
        else:
            content = np.fromfile(path, dtype=np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4].tolist() != [0, 0, _UINT8, dimensions]:
        raise _damaged(path, f"it must begin as an IDX file of {dimensions} dimensions does")
    shape = tuple(content[4:start].view(">u4").tolist())
    if len(content) - start != np.prod(shape):
        raise _damaged(
            path,
            f"its header promises {' x '.join(map(str, shape))} bytes, "
            f"but {len(content) - start} follow",
        )
    return content[start:].reshape(shape)


def _damaged(path: Path, reason: str) -> DataNotFoundError:
    return DataNotFoundError(
        f"{path} is damaged: {reason}. Delete it, and run again to download it or put the "
        f"original in its place."
    )

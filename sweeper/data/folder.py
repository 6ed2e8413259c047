"""Your own pictures: ``root/{train,test}/<class>/*``, decoded once and then mapped from a cache.

The cache, ``<data folder>/cache/image_folder-<root>-<digest>.npy``, is named after the paths and
sizes of all files and the times when they were last written and replaced, so that a changed folder
is decoded anew. It appears under its name only when it is complete, and is mapped into memory, so
that several workers share its pages.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from filelock import FileLock
from PIL import Image

from sweeper.config.data import IMAGE_SUFFIXES, ImageFolder
from sweeper.data.download import replacing
from sweeper.data.raw import Images, Origin, RawData, RawPart
from sweeper.errors import DataNotFoundError, UsageError

logger = logging.getLogger(__name__)

_GREY_MODES: Final = frozenset({"1", "L", "LA", "I;16"})
_COLOUR_MODES: Final = frozenset({"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"})
_IMAGES_PER_TASK: Final = 256
_PROGRESS_EVERY_S: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """The image files of a folder, train before test, in the order of class and name."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    train_count: int
    digest: str


def image_folder(config: ImageFolder, folder: Path) -> RawData:
    """uint8 ``[N, C, H, W]``; C is 1 where the first training image is grey, and 3 otherwise.

    Raises DataNotFoundError where the folder is not as described or a file cannot be read, and
    UsageError where the images differ in size or are not all grey; the file is named.
    """
    return folder_origin(config, folder).read()


def folder_origin(config: ImageFolder, folder: Path) -> Origin:
    """The images as they are listed now. Raises as :func:`image_folder` does."""
    listing = _listing(Path(config.root).expanduser().absolute())
    return Origin(
        digest=f"{listing.root} {listing.digest}", read=lambda: _read(listing, folder / "cache")
    )


def _read(listing: _Listing, cache: Path) -> RawData:
    images = _images(listing, cache)
    labels = np.asarray(listing.labels, dtype=np.int64)
    split = listing.train_count
    return RawData(
        train=RawPart(images=images[:split], labels=labels[:split]),
        test=RawPart(images=images[split:], labels=labels[split:]),
        classes=listing.classes,
        source=str(listing.root),
    )


def _listing(root: Path) -> _Listing:
    classes = {part: _class_folders(root / part) for part in ("train", "test")}
    if classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))[0]
        where, lacking = ("train", "test") if odd in classes["train"] else ("test", "train")
        raise DataNotFoundError(
            f"{root / 'train'} and {root / 'test'} must have the same class folders, but "
            f"{odd!r} is only in {where}; add {root / lacking / odd}, "
            f"or remove {root / where / odd}"
        )
    if len(classes["train"]) == 1:
        only = root / "train" / classes["train"][0]
        raise DataNotFoundError(
            f"an image folder must have two classes at least, but {only} is the only class folder "
            f"of {root / 'train'}; add another one to train and test, or move the classes up where "
            f"they are inside it"
        )
    files: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    train_count = 0
    for part in ("train", "test"):
        for label, name in enumerate(classes[part]):
            for entry in _image_files(root / part / name):
                status = entry.stat()
                times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
                told = f"{part}/{name}/{entry.name}\0{status.st_size}\0{times}\0"
                digest.update(os.fsencode(told))
                files.append(entry.path)
                labels.append(label)
        train_count = train_count or len(files)
    return _Listing(
        root=root,
        classes=classes["train"],
        files=tuple(files),
        labels=tuple(labels),
        train_count=train_count,
        digest=digest.hexdigest()[:16],
    )


def _class_folders(part: Path) -> tuple[str, ...]:
    try:
        names = sorted(entry.name for entry in part.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataNotFoundError(
            f"data.root must be a folder with train/<class>/* and test/<class>/*, but {part} "
            f"cannot be read ({error.strerror}); correct data.root, or add that folder"
        ) from error
    if not names:
        raise DataNotFoundError(
            f"{part} must contain one folder a class, but it contains none; put the images into "
            f"{part}/<class>/"
        )
    return tuple(names)


def _image_files(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            images = [entry for entry in entries if _names_image(entry.name) and entry.is_file()]
    except OSError as error:
        raise DataNotFoundError(
            f"every class folder must be readable, but {folder} cannot be read "
            f"({error.strerror}); let this user read it, or remove it from both train and test"
        ) from error
    if not images:
        raise DataNotFoundError(
            f"every class folder must contain images ({', '.join(sorted(IMAGE_SUFFIXES))}), but "
            f"{folder} contains none; fill it, or remove it from both train and test"
        )
    return sorted(images, key=lambda entry: entry.name)


def _names_image(name: str) -> bool:
    """Whether a file name ends as an image's does; every worker asks this of every file."""
    stem, dot, ending = name.rpartition(".")
    return bool(stem) and f"{dot}{ending}".lower() in IMAGE_SUFFIXES


def _images(listing: _Listing, cache: Path) -> Images:
    """All images ``[N, C, H, W]`` from the cache, which is written first where it is missing.

    One process decodes while the others wait. Where the cache cannot be written every process
    decodes into its own memory, and a warning says so.
    """
    prefix = f"image_folder-{hashlib.sha256(os.fsencode(listing.root)).hexdigest()[:8]}"
    path = cache / f"{prefix}-{listing.digest}.npy"
    images = _mapped(path, len(listing.files))
    if images is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f".{prefix}.lock"):
                if _mapped(path, len(listing.files)) is None:
                    _write(path, _decoded(listing))
                    for former in set(cache.glob(f"{prefix}-*.npy")) - {path}:
                        former.unlink(missing_ok=True)
            images = _mapped(path, len(listing.files))
        except (OSError, NotImplementedError) as error:  # the latter: no locks on this file system
            logger.warning("decoded images cannot be kept in %s: %s", cache, error)
    return _decoded(listing) if images is None else images


def _mapped(path: Path, count: int) -> Images | None:
    """The cached array, or None where there is none or it is damaged.

    Copy-on-write: pages are shared with other workers, and torch takes the array without a copy,
    as it does not take a read-only one.
    """
    try:
        images: Images = np.load(path, mmap_mode="c")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s is damaged and will be written anew: %s", path, error)
        return None
    return images if images.dtype == np.uint8 and images.shape[:1] == (count,) else None


def _write(path: Path, images: Images) -> None:
    with replacing(path) as file:
        np.save(file, images)


def _decoded(listing: _Listing) -> Images:
    """All images ``[N, C, H, W]`` decoded by a pool of threads.

    PIL decodes without the GIL. Thousands of 32x32 JPEGs take as long as with one thread (about
    0.1 ms each); the pool is for large images and for file systems that answer slowly.
    """
    count = len(listing.files)
    width, height, grey = _header(listing.files[0])
    images = np.empty((count, 1 if grey else 3, height, width), dtype=np.uint8)

    def decode(start: int) -> int:
        tasks = range(start, min(start + _IMAGES_PER_TASK, count))
        for i in tasks:
            pixels_HWC = _pixels(
                listing.files[i], like=listing.files[0], size=(width, height), grey=grey
            )
            images[i] = pixels_HWC.transpose(2, 0, 1)
        return len(tasks)

    logger.info("decoding %d images of %s", count, listing.root)
    started = reported = time.monotonic()
    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for finished in pool.map(decode, range(0, count, _IMAGES_PER_TASK)):
            done += finished
            if time.monotonic() - reported >= _PROGRESS_EVERY_S:
                reported = time.monotonic()
                logger.info("decoded %d of %d images of %s", done, count, listing.root)
    logger.info("decoded %d images in %.1f s", count, time.monotonic() - started)
    return images


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image file ``path``. Raises DataNotFoundError where it is damaged."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataNotFoundError(
            f"{path} must be an image, but cannot be read ({error}); replace or remove it"
        ) from error


def _header(path: str) -> tuple[int, int, bool]:
    """Width, height and whether it is grey, without decoding."""
    with _opened(path) as image:
        return image.width, image.height, image.mode in _GREY_MODES


def _pixels(path: str, *, like: str, size: tuple[int, int], grey: bool) -> Images:
    """The image as uint8 ``[H, W, C]``. Raises UsageError where it differs from the first one."""
    with _opened(path) as image:
        if image.size != size:
            raise UsageError(
                f"all images of a folder must have one size, but {path} is "
                f"{image.width}x{image.height} and {like} is {size[0]}x{size[1]}; "
                f"resize or remove it"
            )
        if grey and image.mode not in _GREY_MODES:
            raise UsageError(
                f"all images must be grey where the first one is, but {path} is {image.mode} and "
                f"{like} is grey; convert one or the other"
            )
        if image.mode not in _GREY_MODES | _COLOUR_MODES:
            raise UsageError(
                f"images must have 8 bits a channel or be 16-bit grey, but {path} has pixels of "
                f"type {image.mode}; convert it"
            )
        if image.mode == "I;16":  # PIL would clip at 255 instead of scaling
            pixels_HW = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(pixels_HW[:, :, None], 1 if grey else 3, axis=2)
        if image.mode in {"P", "PA"}:  # by way of RGBA, as PIL asks for transparent palettes
            image = image.convert("RGBA")
        return np.asarray(image.convert("L" if grey else "RGB")).reshape(size[1], size[0], -1)

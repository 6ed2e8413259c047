"""Image folders: what is read, what is refused, and what the cache does."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sweeper.config.data import ImageFolder, shape_of
from sweeper.data.folder import image_folder as read
from sweeper.data.raw import RawData
from sweeper.errors import DataNotFoundError, UsageError

Write = Callable[..., Path]


def config(root: Path) -> ImageFolder:
    return ImageFolder(name="image_folder", root=str(root))


def load(root: Path, folder: Path) -> RawData:
    return read(config(root), folder)


def caches(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*.npy"))


def decodings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.getMessage().startswith("decoding") for record in caplog.records)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_pixels_labels_and_classes(
    image_folder: Write, nasty_folder: Path, mode: str, channels: int
) -> None:
    root = image_folder(("b", "a", "c d"), train=5, test=2, size=(6, 9), mode=mode)
    raw = load(root, nasty_folder)
    assert raw.classes == ("a", "b", "c d")
    assert raw.train.images.shape == (15, channels, 9, 6)
    assert raw.test.images.shape == (6, channels, 9, 6)
    assert raw.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert shape_of(config(root)) == (channels, 9, 6, 3)
    for part, images in (("train", raw.train.images), ("test", raw.test.images)):
        files = [file for name in raw.classes for file in sorted((root / part / name).iterdir())]
        for file, image in zip(files, images, strict=True):
            expected = np.asarray(Image.open(file))
            expected = expected if expected.ndim == 3 else expected[:, :, None]
            assert np.array_equal(image.transpose(1, 2, 0), expected)


def test_jpeg_and_other_files_beside_the_images(image_folder: Write, tmp_path: Path) -> None:
    root = image_folder(suffix=".JPG", train=3, test=1)
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / "Thumbs.db").write_text("not a class")
    assert load(root, tmp_path).train.images.shape == (6, 3, 8, 8)


def test_the_second_time_comes_from_the_cache(
    image_folder: Write, nasty_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder()
    caplog.set_level(logging.INFO)
    first = load(root, nasty_folder)
    again = load(root, nasty_folder)
    assert decodings(caplog) == 1
    assert np.array_equal(first.train.images, again.train.images)
    assert isinstance(again.train.images, np.memmap)
    assert len(caches(nasty_folder)) == 1


def test_workers_that_start_together_decode_once(
    image_folder: Write, nasty_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder()
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(4) as pool:
        sums = set(pool.map(lambda _: int(load(root, nasty_folder).train.images.sum()), range(4)))
    assert len(sums) == 1
    assert decodings(caplog) == 1


def test_writing_to_the_array_leaves_the_cache_alone(
    image_folder: Write, nasty_folder: Path
) -> None:
    root = image_folder()
    before = load(root, nasty_folder).train.images.copy()
    load(root, nasty_folder).train.images[:] = 0
    assert np.array_equal(load(root, nasty_folder).train.images, before)


def change_content(root: Path) -> None:
    file = root / "train" / "cat" / "00000.png"
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(file)


def change_time(root: Path) -> None:
    os.utime(root / "test" / "cat" / "00000.png", ns=(0, 1))


def change_name(root: Path) -> None:
    file = root / "train" / "cat" / "00000.png"
    file.rename(file.with_name("renamed.png"))


def add_file(root: Path) -> None:
    shutil.copy2(root / "train" / "cat" / "00000.png", root / "train" / "cat" / "new.png")


@pytest.mark.parametrize("change", [change_content, change_time, change_name, add_file])
def test_a_stale_cache_is_replaced(
    image_folder: Write, nasty_folder: Path, change: Callable[[Path], None]
) -> None:
    root = image_folder()
    load(root, nasty_folder)
    former = caches(nasty_folder)
    change(root)
    raw = load(root, nasty_folder)
    assert len(caches(nasty_folder)) == 1
    assert caches(nasty_folder) != former
    files = sorted((root / "train" / "cat").iterdir())
    for file, image in zip(files, raw.train.images, strict=False):
        assert np.array_equal(image.transpose(1, 2, 0), np.asarray(Image.open(file)))


def test_another_picture_of_the_same_size_and_time_is_read(
    image_folder: Write, tmp_path: Path
) -> None:
    """As copying with times leaves one."""
    root = image_folder(suffix=".bmp")
    file = root / "train" / "cat" / "00000.bmp"
    before, status = load(root, tmp_path).train.images[0].copy(), file.stat()
    Image.fromarray(255 - before.transpose(1, 2, 0)).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert np.array_equal(load(root, tmp_path).train.images[0], 255 - before)


def test_the_caches_of_two_roots_live_side_by_side(
    image_folder: Write, nasty_folder: Path, tmp_path: Path
) -> None:
    root = image_folder()
    shutil.copytree(root, tmp_path / "copy")
    load(root, nasty_folder)
    load(tmp_path / "copy", nasty_folder)
    assert len(caches(nasty_folder)) == 2


@pytest.mark.parametrize("content", [b"", b"not an array", None])
def test_a_damaged_cache_is_written_anew(
    image_folder: Write, nasty_folder: Path, content: bytes | None
) -> None:
    root = image_folder()
    before = load(root, nasty_folder).train.images.copy()
    (cache,) = caches(nasty_folder)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-10] if content is None else content)
    assert np.array_equal(load(root, nasty_folder).train.images, before)
    assert cache.read_bytes() == whole


def test_without_a_cache_folder_images_are_decoded_into_memory(
    image_folder: Write, nasty_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (nasty_folder / "cache").write_text("a file in its place")
    raw = load(image_folder(), nasty_folder)
    assert raw.train.images.shape == (24, 3, 8, 8)
    assert "cannot be kept" in caplog.text


def test_palette_transparent_and_grey_images_become_colour(
    image_folder: Write, tmp_path: Path
) -> None:
    root = image_folder()
    cat = root / "train" / "cat"
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(cat / "z1.png")
    Image.new("P", (8, 8)).save(cat / "z2.gif", transparency=0)
    Image.new("L", (8, 8), 77).save(cat / "z3.png")
    Image.fromarray(np.full((8, 8), 0x4DFF, dtype=np.uint16)).save(cat / "z4.png")
    images = load(root, tmp_path).train.images
    assert images[12, :, 0, 0].tolist() == [10, 20, 30]
    assert images[14, :, 0, 0].tolist() == [77] * 3
    assert images[15, :, 0, 0].tolist() == [0x4D] * 3


def test_sixteen_bit_grey_is_scaled_and_not_clipped(image_folder: Write, tmp_path: Path) -> None:
    root = image_folder(mode="L")
    for part in ("train", "test"):
        for file in (root / part).rglob("*.png"):
            Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16)).save(file)
    raw = load(root, tmp_path)
    assert raw.train.images.shape == (24, 1, 8, 8)
    assert (raw.train.images == 0x80).all()


def refuse_size(root: Path) -> str:
    Image.new("RGB", (8, 9)).save(root / "test" / "cat" / "zz.png")
    return r"must have one size, but .*/test/cat/zz.png is 8x9 and .*00000.png is 8x8"


def refuse_damaged(root: Path) -> str:
    file = root / "train" / "it's a dog" / "00003.png"
    file.write_bytes(file.read_bytes()[:60])
    return r"it's a dog/00003.png must be an image, but cannot be read"


def refuse_text(root: Path) -> str:
    (root / "train" / "cat" / "00000.png").write_text("no image")
    return r"train/cat/00000.png must be an image, but cannot be read"


def refuse_float(root: Path) -> str:
    Image.new("F", (8, 8)).save(root / "train" / "cat" / "zz.tiff")
    return r"zz.tiff has pixels of type F"


def refuse_lacking_class(root: Path) -> str:
    shutil.rmtree(root / "test" / "cat")
    return r"same class folders, but 'cat' is only in train; add .*test/cat"


def refuse_new_class(root: Path) -> str:
    (root / "test" / "ant").mkdir()
    return r"same class folders, but 'ant' is only in test; add .*train/ant"


def refuse_empty_class(root: Path) -> str:
    for part in ("train", "test"):
        (root / part / "ant").mkdir()
    return r"every class folder must contain images .*train/ant contains none"


def refuse_one_class(root: Path) -> str:
    for part in ("train", "test"):
        shutil.rmtree(root / part / "it's a dog")
    return r"two classes at least, but .*/train/cat is the only class folder of .*/train; add"


def refuse_one_folder_too_many(root: Path) -> str:
    for part in ("train", "test"):
        (root / part).rename(root / "classes")
        (root / part / "images").mkdir(parents=True)
        (root / "classes").rename(root / part / "images" / "classes")
    return r"two classes at least, but .*/train/images is the only class folder"


def refuse_no_test(root: Path) -> str:
    shutil.rmtree(root / "test")
    return r"/test cannot be read \(No such file or directory\); correct data.root"


def refuse_flat(root: Path) -> str:
    shutil.rmtree(root / "train" / "cat")
    shutil.rmtree(root / "train" / "it's a dog")
    return r"/train must contain one folder a class, but it contains none"


def refuse_no_root(root: Path) -> str:
    shutil.rmtree(root)
    return r"data.root must be a folder with train/<class>/\*"


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (refuse_size, UsageError),
        (refuse_damaged, DataNotFoundError),
        (refuse_text, DataNotFoundError),
        (refuse_float, UsageError),
        (refuse_lacking_class, DataNotFoundError),
        (refuse_new_class, DataNotFoundError),
        (refuse_empty_class, DataNotFoundError),
        (refuse_one_class, DataNotFoundError),
        (refuse_one_folder_too_many, DataNotFoundError),
        (refuse_no_test, DataNotFoundError),
        (refuse_flat, DataNotFoundError),
        (refuse_no_root, DataNotFoundError),
    ],
)
def test_what_is_wrong_is_named(
    image_folder: Write,
    nasty_folder: Path,
    spoil: Callable[[Path], str],
    error: type[Exception],
) -> None:
    root = image_folder()
    reason = spoil(root)
    with pytest.raises(error, match=reason) as caught:
        load(root, nasty_folder)
    assert type(caught.value) is error
    assert caches(nasty_folder) == []


def test_a_class_folder_that_cannot_be_read_is_named(
    image_folder: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, original = image_folder(), os.scandir

    def scandir(path: Path) -> object:  # tests may run as root, who may read everything
        if Path(path).name == "cat":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataNotFoundError, match=r"train/cat cannot be read \(Permission denied\)"):
        load(root, tmp_path)


def test_a_colour_image_among_grey_ones_is_named(image_folder: Write, tmp_path: Path) -> None:
    root = image_folder(mode="L")
    Image.new("RGB", (8, 8)).save(root / "test" / "cat" / "zz.png")
    with pytest.raises(
        UsageError, match=r"must be grey where the first one is, but .*zz.png is RGB"
    ):
        load(root, tmp_path)

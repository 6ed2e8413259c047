"""Data sets that all workers of a machine map from one file."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from small_data import learnable_images, write_idx
from torch import Tensor

from sweeper.config.data import DataConfig
from sweeper.data import Dataset, load
from sweeper.data.shared import Content, SharedFolder, usage
from sweeper.errors import DataNotFoundError
from sweeper.settings import prepared_folder

CPU = torch.device("cpu")
Idx = Callable[..., Path]


def load_section(folder: Path, name: str = "kmnist", **section: Any) -> Dataset:
    config: DataConfig = TypeAdapter(DataConfig).validate_python({"name": name, **section})
    return load(config, folder=folder, device=CPU)


def tensors(data: Dataset) -> dict[str, Tensor]:
    """All that a trial computes with."""
    found = {f"buffer.{name}": buffer for name, buffer in data.standardize.named_buffers()}
    for name, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        found[f"{name}.images"], found[f"{name}.labels"] = part.images, part.labels
        found[f"{name}.floats"] = (
            data.standardize.whole(part.images, torch.float32)
            if part.standardized is None
            else part.standardized()
        )
    return found


def shared_files(folder: Path, ending: str = ".pt") -> list[Path]:
    return sorted(prepared_folder(folder).glob(f"*{ending}"))


def content(value: int = 1, size: int = 1000) -> Content:
    return Content(tensors={"x": torch.full((size,), value, dtype=torch.uint8)})


def refuse_to_make() -> Content:
    raise AssertionError("it must not be made again")


@contextmanager
def file_sizes_limited(nbytes: int) -> Iterator[None]:
    """What a full disk does to a file that is being written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"standardize": "none", "limit": 60},
        {"standardize": "zca", "split_seed": 3},
        {"augment": [{"name": "crop", "size": 20, "padding": 0}, "flip"]},
    ],
)
def test_shared_data_are_bit_for_bit_those_that_are_not(
    idx_folder: Idx, section: dict[str, Any]
) -> None:
    folder = idx_folder()
    (folder / "cache").write_text("no folder, so nothing can be shared")
    own = load_section(folder, **section)
    expected = tensors(own)
    assert not shared_files(folder)
    (folder / "cache").unlink()
    for _ in range(3):  # made, found, and found with floats that somebody has shared
        data = load_section(folder, **section)
        assert data.describe() == own.describe()
        assert (data.digest, data.shape, data.augment) == (own.digest, own.shape, own.augment)
        found = tensors(data)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    assert len(shared_files(folder)) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mappings")
def test_what_a_trial_reads_is_mapped_from_the_files(idx_folder: Idx) -> None:
    folder = idx_folder()
    for _ in range(2):
        found = tensors(load_section(folder))
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, *_, name = line.split(maxsplit=5)
        if ".pt" in name:
            start, _, stop = places.partition("-")
            mappings.append(range(int(start, 16), int(stop, 16)))
    for name, tensor in found.items():
        assert any(tensor.data_ptr() in each for each in mappings), name


def test_writing_into_the_tensors_reaches_no_file(idx_folder: Idx) -> None:
    folder = idx_folder()
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in tensors(load_section(folder)).items()}
    stored = {file: file.read_bytes() for file in shared_files(folder)}
    for tensor in tensors(load_section(folder)).values():
        tensor.zero_()
    after = tensors(load_section(folder))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert stored == {file: file.read_bytes() for file in shared_files(folder)}


def test_floats_are_shared_from_the_second_trial_on(idx_folder: Idx) -> None:
    folder = idx_folder()
    first = load_section(folder)
    assert first.train.standardized is not None
    alone = first.train.standardized()
    assert [file.name.split("-")[1] for file in shared_files(folder)] == ["parts", "statistics"]
    shared = first.train.standardized()
    assert [file.name.split("-")[1] for file in shared_files(folder)][-1] == "train"
    assert torch.equal(alone, shared)
    assert first.train.standardized() is shared


def test_sections_share_the_parts_that_are_the_same(idx_folder: Idx) -> None:
    folder = idx_folder()
    load_section(folder)
    load_section(folder, augment=["flip", "crop"])
    load_section(folder, standardize="none")
    assert len(list(prepared_folder(folder).glob("*-parts-*"))) == 1
    load_section(folder, split_seed=1)
    load_section(folder, augment=[{"name": "crop", "size": 20, "padding": 0}])
    assert len(list(prepared_folder(folder).glob("*-parts-*"))) == 3


def test_changed_files_are_read_anew_even_where_size_and_time_are_the_same(
    idx_folder: Idx,
) -> None:
    folder = idx_folder()
    former = load_section(folder)
    file = folder / "KMNIST" / "raw" / "train-images-idx3-ubyte"
    status = file.stat()
    time.sleep(0.02)  # the clock of file systems ticks every few milliseconds
    write_idx(file, learnable_images(200, (28, 28), 10, seed=7)[0])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_section(folder).digest != former.digest


def test_missing_and_damaged_files_are_named_as_ever(idx_folder: Idx) -> None:
    folder = idx_folder()
    file = folder / "KMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(b"\0")
    with pytest.raises(DataNotFoundError, match="t10k-labels-idx1-ubyte is damaged"):
        load_section(folder)
    assert not shared_files(folder)


def truncate(stored: bytes) -> bytes:
    return stored[:-100]


def zero_a_page(stored: bytes) -> bytes:
    return stored[:8192] + bytes(4096) + stored[12288:]


def flip_a_bit(stored: bytes) -> bytes:
    return stored[:20_000] + bytes([stored[20_000] ^ 1]) + stored[20_001:]


def replace_it(stored: bytes) -> bytes:
    return b"something else"


def empty_it(stored: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncate, zero_a_page, flip_a_bit, replace_it, empty_it])
def test_a_damaged_file_is_set_aside_and_made_anew(
    idx_folder: Idx, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    folder = idx_folder()
    before = {name: tensor.clone() for name, tensor in tensors(load_section(folder)).items()}
    (file,) = prepared_folder(folder).glob("*-parts-*")
    stored = file.read_bytes()
    file.write_bytes(damage(stored))
    after = tensors(load_section(folder))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert f"{file} is damaged" in caplog.text
    (aside,) = shared_files(folder, ".damaged")
    assert aside.read_bytes() == damage(stored)
    caplog.clear()
    load_section(folder)
    assert not caplog.records


def test_a_file_of_another_key_or_format_is_not_taken(tmp_path: Path) -> None:
    shared = SharedFolder(folder=tmp_path, name="set")
    shared.get("kind", {"seed": 0}, content)
    (file,) = tmp_path.glob("*.pt")
    shared.get("kind", {"seed": 1}, lambda: content(2))
    (other,) = set(tmp_path.glob("*.pt")) - {file}
    other.write_bytes(file.read_bytes())
    assert shared.get("kind", {"seed": 1}, lambda: content(3)).tensors["x"][0] == 3


def test_a_full_disk_is_said_once_and_leaves_nothing_behind(
    idx_folder: Idx, caplog: pytest.LogCaptureFixture
) -> None:
    folder = idx_folder()
    with file_sizes_limited(10_000):
        data = load_section(folder)
        for _ in range(2):
            assert all(tensor.any() for tensor in tensors(data).values())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "copy of kmnist of its own" in caplog.text
    assert [file.name for file in prepared_folder(folder).iterdir()] in ([], [".kmnist.lock"])


def test_the_folder_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wanted(seed: int) -> Content:
        folder = SharedFolder(folder=tmp_path, name="set")
        return folder.get("kind", {"seed": seed}, lambda: content(seed, size=10_000))

    monkeypatch.setattr("sweeper.data.shared.LIMIT_BYTES", 30_000)
    assert [wanted(seed).mapped for seed in range(3)] == [True, True, False]
    assert "it may take" in caplog.text
    count, nbytes = usage(tmp_path)
    assert (count, nbytes < 30_000) == (2, True)

    for file in tmp_path.glob("*.pt"):
        os.utime(file, (1, 1))
    assert wanted(0).mapped  # opened: it counts as used from now on
    assert [wanted(seed).mapped for seed in (3, 4)] == [True, False]
    assert wanted(0).new is False
    assert wanted(1).mapped is False


def test_one_process_makes_what_several_want_at_once(tmp_path: Path) -> None:
    made, together = list[int](), Barrier(4)

    def make() -> Content:
        made.append(1)
        time.sleep(0.1)
        return content(5)

    def want(_: int) -> Mapping[str, Tensor]:
        shared = SharedFolder(folder=tmp_path, name="set")
        together.wait()
        return shared.get("kind", {}, make).tensors

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(want, range(4)))
    assert len(made) == 1
    assert all(each["x"].tolist() == [5] * 1000 for each in found)


def test_what_cannot_be_made_is_not_remembered(tmp_path: Path) -> None:
    shared = SharedFolder(folder=tmp_path, name="set")

    def fail() -> Content:
        raise OSError("no such data")

    with pytest.raises(OSError, match="no such data"):
        shared.get("kind", {}, fail)
    assert shared.get("kind", {}, content).mapped
    assert shared.get("kind", {}, refuse_to_make).mapped


def test_a_view_is_stored_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    shared = SharedFolder(folder=tmp_path, name="set")
    whole = torch.arange(100_000)
    found = shared.get("kind", {}, lambda: Content(tensors={"x": whole[10:20], "y": whole[::2]}))
    assert torch.equal(found.tensors["x"], whole[10:20])
    assert torch.equal(found.tensors["y"], whole[::2])
    assert usage(tmp_path)[1] < 500_000

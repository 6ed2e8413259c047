"""CIFAR-10 from an archive in torchvision's layout, small and with checksums of its own."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from sweeper.config.data import Cifar10
from sweeper.data.cifar import cifar10
from sweeper.errors import DataNotFoundError

CONFIG = Cifar10(name="cifar10")
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def archive(tmp_path: Path, nasty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``cifar-10-python.tar.gz`` in the data folder, 10 images a batch, and no network."""
    batches = tmp_path / CIFAR10.base_folder
    batches.mkdir()

    def write(name: str, content: object) -> list[str]:
        (batches / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((batches / name).read_bytes()).hexdigest()]

    lists = []
    for seed, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        data = np.random.default_rng(seed).integers(0, 256, (10, 3072), dtype=np.uint8)
        lists.append(write(name, {"data": data, "labels": list(range(10))}))
    _, meta_md5 = write("batches.meta", {"label_names": CLASSES})
    path = nasty_folder / CIFAR10.filename
    with tarfile.open(path, "w:gz") as file:
        file.add(batches, arcname=CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(CIFAR10, "test_list", lists[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta_md5})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return path


def test_an_archive_in_the_folder_is_unpacked_and_read(archive: Path) -> None:
    raw = cifar10(CONFIG, archive.parent)
    assert raw.train.images.shape == (50, 3, 32, 32)
    assert raw.test.images.shape == (10, 3, 32, 32)
    assert raw.classes == tuple(CLASSES)
    second = np.random.default_rng(1).integers(0, 256, (10, 3072), dtype=np.uint8)
    assert np.array_equal(raw.train.images[10:20], second.reshape(10, 3, 32, 32))
    assert raw.train.labels.tolist() == list(range(10)) * 5
    assert raw.train.images.flags.c_contiguous
    assert Path(raw.source) == archive.parent / CIFAR10.base_folder


def test_the_unpacked_folder_is_enough(archive: Path) -> None:
    cifar10(CONFIG, archive.parent)
    archive.unlink()
    assert len(cifar10(CONFIG, archive.parent).train.labels) == 50


def test_without_anything_the_message_says_what_to_do(archive: Path) -> None:
    archive.unlink()
    with pytest.raises(DataNotFoundError) as caught:
        cifar10(CONFIG, archive.parent)
    for part in (str(archive.parent), archive.name, "SWEEPER_DATA", "image_folder", "refused"):
        assert part in str(caught.value)


def test_a_damaged_archive_is_named(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataNotFoundError, match=rf"{CIFAR10.filename}: the MD5 checksum must be"):
        cifar10(CONFIG, archive.parent)
    assert not (archive.parent / CIFAR10.base_folder).exists()


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_or_missing_batch_is_named(archive: Path, name: str) -> None:
    cifar10(CONFIG, archive.parent)
    path = archive.parent / CIFAR10.base_folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataNotFoundError, match=rf"{name} is damaged: its MD5 checksum must be"):
        cifar10(CONFIG, archive.parent)
    path.unlink()
    with pytest.raises(DataNotFoundError, match=rf"{name} must be there, but is missing"):
        cifar10(CONFIG, archive.parent)

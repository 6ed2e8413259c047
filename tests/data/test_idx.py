"""IDX files: raw and packed, whole and damaged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_data import learnable_images, write_idx
from torchvision import datasets

from sweeper.config.data import FashionMnist, Kmnist, Mnist
from sweeper.data.idx import idx
from sweeper.errors import DataNotFoundError

SECTIONS = {
    "mnist": Mnist(name="mnist"),
    "fashion_mnist": FashionMnist(name="fashion_mnist"),
    "kmnist": Kmnist(name="kmnist"),
}
KMNIST = SECTIONS["kmnist"]


@pytest.mark.parametrize("name", SECTIONS)
def test_agrees_with_torchvision(idx_folder: Callable[..., Path], name: str) -> None:
    folder = idx_folder(name, train=30, test=20)
    raw = idx(SECTIONS[name], folder)
    reference = getattr(datasets, Path(raw.source).parent.name)
    for part, train in ((raw.train, True), (raw.test, False)):
        expected = reference(folder, train=train)
        assert np.array_equal(part.images[:, 0], expected.data.numpy())
        assert np.array_equal(part.labels, expected.targets.numpy())
    # torchvision's MNIST has "0 - zero" for "0"
    assert raw.classes == tuple(c.split(" - ")[0] for c in reference.classes)


def test_packed_files_are_read_in_place(idx_folder: Callable[..., Path]) -> None:
    folder = idx_folder(train=30, test=20, packed=True)
    before = sorted(folder.rglob("*"))
    raw = idx(KMNIST, folder)
    images, labels = learnable_images(30, (28, 28), 10, seed=0)
    assert np.array_equal(raw.train.images[:, 0], images)
    assert np.array_equal(raw.train.labels, labels)
    assert sorted(folder.rglob("*")) == before


def damage_short(raw: Path) -> str:
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    return r"header promises 200 x 28 x 28 bytes, but 156799 follow"


def damage_empty(raw: Path) -> str:
    (raw / "train-images-idx3-ubyte").write_bytes(b"")
    return r"must begin as an IDX file of 3 dimensions"


def damage_kind(raw: Path) -> str:
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes((raw / "train-labels-idx1-ubyte").read_bytes())
    return r"must begin as an IDX file of 3 dimensions"


def damage_page(raw: Path) -> str:
    (raw / "train-images-idx3-ubyte").write_bytes(b"<html>not found</html>")
    return r"must begin as an IDX file of 3 dimensions"


def damage_size(raw: Path) -> str:
    write_idx(raw / "train-images-idx3-ubyte", np.zeros((200, 32, 32)))
    return r"images of kmnist are 28x28, but these are 32x32"


def damage_count(raw: Path) -> str:
    write_idx(raw / "train-labels-idx1-ubyte", np.zeros(199))
    return r"one label for each of the 200 images.*but there are 199"


def damage_label(raw: Path) -> str:
    write_idx(raw / "train-labels-idx1-ubyte", np.full(200, 11))
    return r"labels must be below 10, but one is 11"


@pytest.mark.parametrize(
    "damage",
    [
        damage_short,
        damage_empty,
        damage_kind,
        damage_page,
        damage_size,
        damage_count,
        damage_label,
    ],
)
def test_a_damaged_file_is_named(
    idx_folder: Callable[..., Path], damage: Callable[[Path], str]
) -> None:
    folder = idx_folder()
    reason = damage(folder / "KMNIST" / "raw")
    with pytest.raises(DataNotFoundError, match=reason) as caught:
        idx(KMNIST, folder)
    assert re.search(r"raw/train-(images|labels)-idx\d-ubyte is damaged", str(caught.value))
    assert "Delete it" in str(caught.value)


@pytest.mark.parametrize("at", [5, 400, -6])
def test_a_damaged_packed_file_is_named(idx_folder: Callable[..., Path], at: int) -> None:
    folder = idx_folder(packed=True)
    path = folder / "KMNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()
    for broken in (content[:at], content[:at] + b"\xff\x00\xff" + content[at + 3 :]):
        path.write_bytes(broken)
        if at == 5 and len(broken) == len(content):
            continue  # bytes 5 to 7 of the gzip header are a time, which nothing reads
        with pytest.raises(DataNotFoundError, match=r"t10k-images-idx3-ubyte.gz is damaged"):
            idx(KMNIST, folder)

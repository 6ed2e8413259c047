"""Loading a data section: parts, statistics, limits, digests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from small_data import learnable_images, write_idx
from torch import Tensor

from sweeper.config.data import DataConfig, shape_of
from sweeper.data import DATASETS, Dataset, Part, load
from sweeper.errors import UsageError

CPU = torch.device("cpu")


def load_section(folder: Path, name: str = "kmnist", **section: Any) -> Dataset:
    config: DataConfig = TypeAdapter(DataConfig).validate_python({"name": name, **section})
    return load(config, folder=folder, device=CPU)


def keys(part: Part) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images}


def counts(part: Part) -> list[int]:
    return torch.bincount(part.labels).tolist()


def test_every_data_set_of_the_configuration_has_a_source() -> None:
    sections = get_args(get_args(DataConfig)[0])
    names = {get_args(section.model_fields["name"].annotation)[0] for section in sections}
    assert set(DATASETS) == names


def test_parts_are_disjoint_stratified_and_complete(idx_folder: Callable[..., Path]) -> None:
    data = load_section(idx_folder(train=200, test=50), validation=0.25, split_seed=7)
    train, val = keys(data.train), keys(data.val)
    assert (len(train), len(val), len(data.test)) == (150, 50, 50)
    assert not train & val
    assert counts(data.train) == [15] * 10
    assert counts(data.val) == [5] * 10
    assert not (train | val) & keys(data.test)
    assert data.shape == (1, 28, 28, 10)


def test_the_split_follows_its_seed_and_the_test_part_does_not(
    idx_folder: Callable[..., Path],
) -> None:
    folder = idx_folder()
    first, again, other = (load_section(folder, split_seed=seed, limit=100) for seed in (0, 0, 1))
    assert torch.equal(first.val.images, again.val.images)
    assert first.digest == again.digest
    assert keys(first.val) != keys(other.val)
    assert keys(first.val) | keys(first.train) == keys(other.val) | keys(other.train)
    assert torch.equal(first.test.images, other.test.images)
    assert first.digest != other.digest


@pytest.mark.parametrize("kind", ["channel", "zca"])
def test_statistics_come_from_the_training_part_alone(
    image_folder: Callable[..., Path], nasty_folder: Path, kind: str
) -> None:
    root = image_folder(train=40)

    def loaded() -> tuple[Dataset, Tensor]:
        data = load_section(nasty_folder, "image_folder", root=str(root), standardize=kind)
        return data, torch.cat([buffer.flatten() for buffer in data.standardize.buffers()])

    def invert(part: Part) -> None:
        chosen = keys(part)
        for file in (root / "train").rglob("*.png"):
            pixels = np.asarray(Image.open(file))
            if pixels.transpose(2, 0, 1).tobytes() in chosen:
                Image.fromarray(255 - pixels).save(file)

    before, statistics = loaded()
    invert(before.val)
    after, same = loaded()
    assert not keys(after.val) & keys(before.val)
    assert keys(after.train) == keys(before.train)
    assert torch.equal(same, statistics)
    invert(before.train)
    assert not torch.allclose(loaded()[1], statistics, atol=1e-3)


def test_a_limit_keeps_classes_in_proportion(idx_folder: Callable[..., Path]) -> None:
    data = load_section(idx_folder(train=200, test=50), limit=40, validation=10)
    assert (counts(data.train), counts(data.val), counts(data.test)) == (
        [3] * 10,
        [1] * 10,
        [4] * 10,
    )


def test_asking_for_more_validation_images_than_a_limit_leaves_is_refused(
    idx_folder: Callable[..., Path],
) -> None:
    with pytest.raises(UsageError, match=r"5000 of 40 were asked for.*data.limit"):
        load_section(idx_folder(), limit=40, validation=5000)


def test_the_digest_is_that_of_the_content(idx_folder: Callable[..., Path]) -> None:
    folder = idx_folder()
    first = load_section(folder)
    images, _ = learnable_images(50, (28, 28), 10, seed=1)
    images[0, 0, 0] ^= 1
    write_idx(folder / "KMNIST" / "raw" / "t10k-images-idx3-ubyte", images)
    assert load_section(folder).digest != first.digest
    images[0, 0, 0] ^= 1
    write_idx(folder / "KMNIST" / "raw" / "t10k-images-idx3-ubyte", images, packed=True)
    (folder / "KMNIST" / "raw" / "t10k-images-idx3-ubyte").unlink()
    assert load_section(folder).digest == first.digest
    assert load_section(folder, standardize="none").digest == first.digest


def test_digits_and_circles_need_no_files(tmp_path: Path) -> None:
    digits = load_section(tmp_path / "absent", "digits")
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1294, 144, 359)
    assert digits.train.images.dtype == torch.uint8
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)
    assert max(counts(digits.test)) - min(counts(digits.test)) <= 2
    circles = load_section(tmp_path / "absent", "circles", samples=500, noise=0.0, factor=0.3)
    assert (len(circles.train), len(circles.val), len(circles.test)) == (360, 40, 100)
    radii = circles.train.images.norm(dim=3).flatten()
    torch.testing.assert_close(
        radii, torch.where(circles.train.labels == 1, 0.3, 1.0), atol=1e-5, rtol=0
    )
    assert not (tmp_path / "absent").exists()
    for data in (digits, circles):
        config = TypeAdapter(DataConfig).validate_python({"name": data.name})
        assert data.shape == shape_of(config)


def test_circles_follow_their_own_seed(tmp_path: Path) -> None:
    first, again, other = (load_section(tmp_path, "circles", data_seed=s).digest for s in (0, 0, 1))
    assert first == again != other


def test_the_description_is_plain_and_complete(idx_folder: Callable[..., Path]) -> None:
    folder = idx_folder("fashion_mnist")
    data = load_section(folder, "fashion_mnist")
    description = json.loads(json.dumps(data.describe()))
    assert description == {
        "name": "fashion_mnist",
        "source": str(folder / "FashionMNIST" / "raw"),
        "digest": data.digest,
        "shape": [1, 28, 28],
        "classes": list(data.classes),
        "train": 180,
        "val": 20,
        "test": 50,
    }
    assert description["classes"][0] == "T-shirt/top"


def test_a_part_moves_as_a_whole() -> None:
    part = Part(images=torch.zeros(3, 1, 2, 2), labels=torch.zeros(3, dtype=torch.int64))
    moved = part.to("meta")
    assert len(moved) == 3
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")


def test_augmentations_of_the_section_arrive(idx_folder: Callable[..., Path]) -> None:
    data = load_section(idx_folder(), augment=["flip", {"name": "crop", "padding": 2}])
    assert [step.name for step in data.augment.steps] == ["flip", "crop"]
    assert data.augment(data.train.images).shape == data.train.images.shape


@pytest.mark.parametrize("standardize", ["channel", "zca"])
def test_a_crop_of_its_own_size_cuts_what_is_evaluated_about_the_centre(
    idx_folder: Callable[..., Path], standardize: str
) -> None:
    folder = idx_folder()
    whole = load_section(folder)
    crop = [{"name": "crop", "padding": 0, "size": 20}]
    data = load_section(folder, augment=crop, standardize=standardize)
    assert data.shape == (1, 20, 20, 10)
    assert torch.equal(data.train.images, whole.train.images)
    assert torch.equal(data.val.images, whole.val.images[..., 4:24, 4:24])
    assert torch.equal(data.test.images, whole.test.images[..., 4:24, 4:24])
    x_BCHW = data.standardize(data.augment(data.train.images))
    assert x_BCHW.shape[1:] == data.standardize(data.test.images).shape[1:] == (1, 20, 20)


def test_a_crop_must_fit_the_images(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    section = {"name": "image_folder", "augment": [{"name": "crop", "size": 9}]}
    adapter: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
    config = adapter.validate_python({**section, "root": str(tmp_path / 'my "own" pictures')})
    root = image_folder()  # 8x8; not there when the section was read
    with pytest.raises(UsageError, match="must be at most the image's 8x8, but got size=9"):
        load(config, folder=tmp_path, device=CPU)
    with pytest.raises(ValidationError, match="must be at most the image's 8x8, but got size=9"):
        adapter.validate_python({**section, "root": str(root)})


@pytest.mark.parametrize("name", ["digits", "circles"])
def test_what_is_generated_is_shared_with_nobody(tmp_path: Path, name: str) -> None:
    assert load_section(tmp_path, name).train.standardized is None
    assert not list(tmp_path.iterdir())

"""Trial configurations: what the sections mean together."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sweeper.config import TrialConfig, shape_of
from sweeper.config.data import Cifar10, Circles, Crop, Digits, training_images
from sweeper.data.generated import circles, digits
from sweeper.models import build


def config(model: dict[str, Any], *augment: dict[str, Any]) -> TrialConfig:
    data = {"name": "cifar10", "augment": list(augment)}
    return TrialConfig.model_validate({"data": data, "model": model})


def test_the_model_sees_what_the_crops_leave() -> None:
    crops = (Crop(size=30, padding=0), Crop(padding=2), Crop(size=28, padding=0))
    assert shape_of(Cifar10(name="cifar10", augment=crops)) == (3, 28, 28, 10)
    crop = {"name": "crop", "size": 28, "padding": 0}
    assert config({"name": "mixer", "patch": 7}, crop).model.name == "mixer"
    with pytest.raises(ValidationError, match="must divide the 28x28 image, but got patch=8"):
        config({"name": "mixer", "patch": 8}, crop)


def test_a_crop_must_fit_what_the_crop_before_it_leaves() -> None:
    with pytest.raises(ValidationError, match="at most the image's 28x28, but got size=30"):
        config({"name": "mlp"}, {"name": "crop", "size": 28}, {"name": "crop", "size": 30})


def test_a_crop_that_changes_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="padding must be at least 1"):
        config({"name": "mlp"}, {"name": "crop", "padding": 0})


def test_a_support_vector_machine_takes_whole_images_only() -> None:
    assert config({"name": "svm"}, {"name": "crop"}).model.name == "svm"
    with pytest.raises(ValidationError, match="it is fitted to whole images"):
        config({"name": "svm"}, {"name": "crop", "size": 28})


def test_the_training_images_of_generated_data_are_as_many_as_are_generated() -> None:
    known = Digits(name="digits")
    assert training_images(known) == len(digits(known, Path()).train.labels)
    for samples in range(50, 60):
        drawn = Circles(name="circles", samples=samples)
        assert training_images(drawn) == len(circles(drawn, Path()).train.labels)


@pytest.mark.parametrize(
    ("data", "images"),
    [
        ({"name": "digits", "validation": 1438}, "1,438"),
        ({"name": "digits", "validation": 0.9999}, "1,438"),
        ({"name": "mnist", "validation": 50, "limit": 50}, "50"),
        ({"name": "image_folder", "root": "/none", "validation": 50, "limit": 50}, "50"),
    ],
)
def test_images_must_be_left_to_train_on(data: dict[str, Any], images: str) -> None:
    model = {"name": "mlp"}
    with pytest.raises(ValidationError, match=f"of {images} training images"):
        TrialConfig.model_validate({"data": data, "model": model})
    fewer = {**data, "validation": 49}
    assert TrialConfig.model_validate({"data": fewer, "model": model}).data.validation == 49


@pytest.mark.parametrize(
    ("data", "model", "needs"),
    [
        ("digits", {"name": "mlp", "norm": "batch"}, True),
        ("digits", {"name": "mlp", "norm": "batch", "layers": 0}, False),
        ("digits", {"name": "mlp", "norm": "layer"}, False),
        ("digits", {"name": "mixer", "patch": 8, "norm": "batch"}, True),
        ("digits", {"name": "mixer", "patch": 8, "stem_norm": "batch"}, True),
        ("digits", {"name": "mixer", "patch": 8, "final_norm": "batch"}, True),
        ("digits", {"name": "mixer", "patch": 8}, False),
        ("digits", {"name": "mixer", "patch": 4, "norm": "batch"}, False),
        ("digits", {"name": "cnn", "batch_norm": True}, False),
        ("digits", {"name": "resnet18"}, True),
        ("mnist", {"name": "resnet18"}, False),
        ("cifar10", {"name": "resnet18", "stem": "imagenet"}, True),
        ("digits", {"name": "vit", "patch": 8}, False),
    ],
)
def test_batch_normalization_of_one_image_is_refused_where_training_would_fail(
    data: str, model: dict[str, Any], needs: bool
) -> None:
    sections = {"data": {"name": data}, "model": model, "train": {"batch_size": 2}}
    two = TrialConfig.model_validate(sections)
    shape = shape_of(two.data)
    assert shape is not None
    network = build(two.model, shape, seed=0).train()
    one_image = torch.zeros(1, shape.channels, shape.height, shape.width)
    with pytest.raises(ValueError, match="more than 1 value") if needs else nullcontext():
        network(one_image)
    sections["train"] = {"batch_size": 1}
    message = "train.batch_size must be at least 2 .* but got 1"
    with pytest.raises(ValidationError, match=message) if needs else nullcontext():
        TrialConfig.model_validate(sections)


def test_the_seed_of_circles_is_one_that_can_be_drawn_with() -> None:
    data = {"name": "circles", "data_seed": 2**32 - 1}
    assert TrialConfig.model_validate({"data": data, "model": {"name": "mlp"}})
    with pytest.raises(ValidationError, match="data_seed"):
        data["data_seed"] = 2**32
        TrialConfig.model_validate({"data": data, "model": {"name": "mlp"}})

"""Trial configurations: what the sections mean together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sweeper.config import TrialConfig, shape_of
from sweeper.config.data import Cifar10, Crop


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

"""What one trial is: the four sections ``data``, ``model``, ``optimizer`` and ``train``.

Pydantic models, frozen, unknown keys refused, and no torch: a study file is validated, and a
trial's configuration put together, without loading it.
"""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from sweeper.config.base import Section
from sweeper.config.data import (
    DataConfig,
    DataShape,
    held_out,
    shape_of,
    source_shape,
    training_images,
)
from sweeper.config.model import ModelConfig, Svm
from sweeper.config.optimizer import OptimizerConfig
from sweeper.config.train import TrainConfig

__all__ = [
    "DataConfig",
    "DataShape",
    "ModelConfig",
    "OptimizerConfig",
    "Section",
    "TrainConfig",
    "TrialConfig",
    "shape_of",
]


class TrialConfig(Section):
    """Everything that decides a trial's numbers, its seed included."""

    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _images_are_left_to_train_on(self) -> Self:
        images, validation = training_images(self.data), self.data.validation
        if images is not None and held_out(validation, images) >= images:
            raise ValueError(
                f"data.validation must leave images to train on, but got {validation} of "
                f"{images:,} training images"
            )
        return self

    @model_validator(mode="after")
    def _model_fits_data(self) -> Self:
        shape = shape_of(self.data)
        if shape is not None:
            self.model.check(shape)
        if isinstance(self.model, Svm) and shape != source_shape(self.data):
            raise ValueError(
                "name must be another than svm where data.augment crops images to another size, "
                "because it is fitted to whole images; leave out the crop's size"
            )
        return self

    @model_validator(mode="after")
    def _batches_can_be_normalized(self) -> Self:
        shape = shape_of(self.data)
        if shape is not None and self.train.batch_size == 1 and self.model.needs_batches(shape):
            raise ValueError(
                "train.batch_size must be at least 2 where batch normalization gets one number a "
                f"channel of an image, as here in model {self.model.name}, but got 1"
            )
        return self

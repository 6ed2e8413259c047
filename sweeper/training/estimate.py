"""How long a trial takes here, from a few of its own steps on random images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from sweeper.config import DataConfig, DataShape, TrialConfig, shape_of
from sweeper.config.data import ImageFolder, held_out, source_shape, training_images
from sweeper.config.model import Svm, Timm
from sweeper.data import Augment, Dataset, Part, Standardize
from sweeper.training.device import best_device, resolved
from sweeper.training.engine import Engine

_CUDA_BATCHES: Final = 20
_QUICK_S: Final = 0.1


def estimate_s(config: TrialConfig, *, device: torch.device | None = None) -> float | None:
    """Seconds that training and validation of one trial take on ``device`` (None: the best one).

    Measured with random images of the right shape, so no data are needed: some batches of training
    after as many that warm up, and some of validation, scaled to the size of the data set and the
    number of epochs. On a CPU that is one batch of 8 images, or of up to 128 where 8 take less than
    a tenth of a second, with one thread, which is what a local worker has. Loading data, the test
    set and compilation come on top. None where the size of the data is unknown, and for a support
    vector machine, whose time does not grow with its data in proportion.
    """
    device = best_device() if device is None else resolved(device)
    shape, images = shape_of(config.data), _images(config.data)
    if shape is None or not images or isinstance(config.model, Svm):
        return None
    config = _without_pretrained_weights(config)
    largest = min(config.train.batch_size, images)
    if device.type == "cuda":
        seconds = _an_image_s(config, shape, device, batch=largest, batches=_CUDA_BATCHES)
    else:
        with _one_thread():
            seconds = _an_image_s(config, shape, device, batch=min(largest, 8), batches=1)
            if seconds[0] * 8 < _QUICK_S:
                seconds = _an_image_s(config, shape, device, batch=min(largest, 128), batches=1)
    training_s, validation_s = seconds
    validated = min(images, held_out(config.data.validation, images))
    return config.train.epochs * (training_s * (images - validated) + validation_s * validated)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several threads on cores that others use as well wait for each other, up to 25 times as
    long as one thread takes (measured with two threads on two cores under load)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _an_image_s(
    config: TrialConfig, shape: DataShape, device: torch.device, *, batch: int, batches: int
) -> tuple[float, float]:
    """Seconds an image in training and in validation."""
    train = config.train.model_copy(update={"batch_size": batch})
    config = config.model_copy(update={"train": train})
    dataset = _random(config.data, shape, batch * batches, device)
    engine = Engine(config, dataset=dataset, device=device)
    try:
        validation = engine.part(dataset.val)
        for epoch in (1, 2):  # the first one warms up
            trained = engine.train(epoch=epoch, lr=config.optimizer.lr, before_batch=_nothing)
            validated = engine.evaluate(validation, _nothing)
    finally:
        engine.drop_graph()
    return trained.seconds / len(dataset.train), validated.seconds / len(dataset.val)


def _images(data: DataConfig) -> int:
    """How many images there are to train and validate on; 0 where that is unknown."""
    if not isinstance(data, ImageFolder):
        return training_images(data) or 0
    images = sum(1 for _ in Path(data.root).expanduser().glob("train/*/*"))
    return images if data.limit is None else min(images, data.limit)


def _without_pretrained_weights(config: TrialConfig) -> TrialConfig:
    """Weights from the internet change no time."""
    if not isinstance(config.model, Timm):
        return config
    return config.model_copy(
        update={"model": config.model.model_copy(update={"pretrained": False})}
    )


def _random(data: DataConfig, shape: DataShape, count: int, device: torch.device) -> Dataset:
    """Random images; ``shape`` is what the model sees of them, after a crop."""
    seen = _random_part(shape, count, device)
    return Dataset(
        name=data.name,
        source="random images",
        shape=shape,
        classes=tuple(str(number) for number in range(shape.classes)),
        train=_random_part(source_shape(data) or shape, count, device),
        val=seen,
        test=seen,
        standardize=Standardize.fit(seen.images, data.standardize),
        augment=Augment(data.augment),
        digest="",
    )


def _random_part(shape: DataShape, count: int, device: torch.device) -> Part:
    generator = torch.Generator().manual_seed(0)
    size = (count, shape.channels, shape.height, shape.width)
    images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    labels = torch.randint(shape.classes, (count,), generator=generator)
    return Part(images=images.to(device), labels=labels.to(device))


def _nothing() -> None:
    pass

"""The ``data`` section: which images, which part validates, how they are prepared.

:func:`shape_of` tells the shape of a data set's images without loading torch, so that a patch
that does not divide the image is found in the study file and not by a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sweeper.config.base import Section

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})


class DataShape(NamedTuple):
    """One example of a data set: ``channels`` x ``height`` x ``width``, one of ``classes``."""

    channels: int
    height: int
    width: int
    classes: int


class Crop(Section):
    """Random crop after zero padding of ``padding`` pixels.

    ``size`` is the side of the square that is cut out (None: the image's own size). Validation and
    test images are cut to it about their centre, and the model sees images of that size.
    """

    name: Literal["crop"] = "crop"
    padding: int = Field(default=4, ge=0)
    size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.size is None and self.padding == 0:
            raise ValueError(
                "padding must be at least 1 where size is not given, but got padding=0; a crop of "
                "the whole image changes nothing"
            )
        return self


class Flip(Section):
    """Horizontal flip with probability ``p``."""

    name: Literal["flip"] = "flip"
    p: float = Field(default=0.5, ge=0, le=1)


class ColorJitter(Section):
    """Random ``brightness``, ``contrast``, ``saturation`` and ``hue``, as torchvision's jitter."""

    name: Literal["color_jitter"] = "color_jitter"
    brightness: float = Field(default=0.2, ge=0)
    contrast: float = Field(default=0.2, ge=0)
    saturation: float = Field(default=0.2, ge=0)
    hue: float = Field(default=0.05, ge=0, le=0.5)


class Rotation(Section):
    """Random rotation by up to ``degrees`` to either side."""

    name: Literal["rotation"] = "rotation"
    degrees: float = Field(default=15.0, gt=0, le=180)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Augmentation = Annotated[
    Crop | Flip | ColorJitter | Rotation, Field(discriminator="name"), BeforeValidator(_named)
]
"""The name of an augmentation, or a mapping with ``name`` and its own fields."""


class _Images(Section):
    """What all data sets share.

    ``validation`` is the part of the training images that is held out, stratified by class, drawn
    with ``split_seed``: a number of images, or a share below 1. ``standardize`` uses statistics of
    the remaining training part only: ``channel`` subtracts the mean and divides by the standard
    deviation of each channel, ``zca`` whitens, ``none`` leaves values in 0 to 1. ``limit`` keeps
    that many training images (and as many test images) at most, stratified, for a quick look.
    ``augment`` lists what is done to training images at random, in order.
    """

    validation: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: int = Field(default=0, ge=0)
    standardize: Literal["none", "channel", "zca"] = "channel"
    augment: tuple[Augmentation, ...] = Field(default=(), strict=False)
    limit: int | None = Field(default=None, ge=10)

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        shape = source_shape(self)  # type: ignore[arg-type] # a subclass, one of DataConfig
        if shape is not None:
            cropped(shape, self.augment)
        return self


class Digits(_Images):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; a fifth is the test set. No download."""

    name: Literal["digits"]


class Circles(Section):
    """Two concentric circles in the plane, two classes (report R1a): 1x1x2 "images".

    ``samples`` points are drawn with ``data_seed``; a fifth is the test set. ``noise`` is the
    standard deviation of a point from its circle. ``factor`` is the inner radius over the outer.
    ``validation`` is the part of the training points that is held out, drawn with ``split_seed``: a
    number of points, or a share below 1. ``standardize`` and ``limit`` as for images. ``augment``
    must be empty.
    """

    name: Literal["circles"]
    samples: int = Field(default=1000, ge=50)
    noise: float = Field(default=0.1, ge=0)
    factor: float = Field(default=0.5, gt=0, lt=1)
    data_seed: int = Field(default=0, ge=0, lt=2**32)
    validation: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: int = Field(default=0, ge=0)
    standardize: Literal["none", "channel"] = "none"
    augment: tuple[Augmentation, ...] = Field(default=(), max_length=0, strict=False)
    limit: int | None = Field(default=None, ge=10)


class Mnist(_Images):
    """MNIST: 60,000 + 10,000 grey 28x28 digits."""

    name: Literal["mnist"]


class FashionMnist(_Images):
    """Fashion-MNIST: 60,000 + 10,000 grey 28x28 garments."""

    name: Literal["fashion_mnist"]


class Kmnist(_Images):
    """KMNIST: 60,000 + 10,000 grey 28x28 hiragana."""

    name: Literal["kmnist"]


class Cifar10(_Images):
    """CIFAR-10: 50,000 + 10,000 colour 32x32 photos."""

    name: Literal["cifar10"]


class ImageFolder(_Images):
    """Your own images: ``root/train/<class>/*`` and ``root/test/<class>/*``, all of one size.

    ``root`` is the folder, relative to where the command is run.
    """

    name: Literal["image_folder"]
    root: str = Field(min_length=1)

    @field_validator("root")
    @classmethod
    def _one_spelling_a_folder(cls, root: str) -> str:
        """``..`` takes back what is before it, but for a link, whose parent is elsewhere."""
        parts: list[str] = []
        for part in Path(root).parts:
            if part != ".." or not parts or parts[-1] == ".." or Path(*parts).is_symlink():
                parts.append(part)
            elif len(parts) > 1 or not Path(parts[0]).is_absolute():
                parts.pop()
        return str(Path(*parts))


DataConfig = Annotated[
    Digits | Circles | Mnist | FashionMnist | Kmnist | Cifar10 | ImageFolder,
    Field(discriminator="name"),
]

_SHAPES: dict[str, DataShape] = {
    "digits": DataShape(1, 8, 8, 10),
    "circles": DataShape(1, 1, 2, 2),
    "mnist": DataShape(1, 28, 28, 10),
    "fashion_mnist": DataShape(1, 28, 28, 10),
    "kmnist": DataShape(1, 28, 28, 10),
    "cifar10": DataShape(3, 32, 32, 10),
}
_TRAINING_IMAGES: dict[str, int] = {
    "digits": 1438,
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "kmnist": 60_000,
    "cifar10": 50_000,
}
"""Those held out for validation included."""


def training_images(data: DataConfig) -> int | None:
    """How many images there are to train and validate on; None where only the files tell.

    Of an image folder there are at most as many as ``limit`` keeps.
    """
    if isinstance(data, ImageFolder):
        return data.limit
    if isinstance(data, Circles):
        images = data.samples - round(data.samples / 5)
    else:
        images = _TRAINING_IMAGES[data.name]
    return images if data.limit is None else min(images, data.limit)


def held_out(validation: int | float, images: int) -> int:
    """How many of so many training images ``validation``, a number or a share, holds out."""
    return max(1, round(validation * images)) if validation < 1 else int(validation)


def shape_of(data: DataConfig) -> DataShape | None:
    """The shape of one example as the model sees it, after a crop to another size.

    None for an image folder that is not there or is empty.
    """
    shape = source_shape(data)
    return None if shape is None else cropped(shape, data.augment)


def source_shape(data: DataConfig) -> DataShape | None:
    """As :func:`shape_of`, of the images as they are stored."""
    if isinstance(data, ImageFolder):
        return _folder_shape(Path(data.root))
    return _SHAPES[data.name]


def cropped(shape: DataShape, augment: Sequence[Augmentation]) -> DataShape:
    """What the crops of ``augment`` leave of images of ``shape``.

    Raises ValueError for a crop that is larger than the image.
    """
    for step in augment:
        if not isinstance(step, Crop) or step.size is None:
            continue
        if step.size > min(shape.height, shape.width):
            raise ValueError(
                f"the size of a crop must be at most the image's {shape.height}x{shape.width}, "
                f"but got size={step.size}"
            )
        shape = shape._replace(height=step.size, width=step.size)
    return shape


def _folder_shape(root: Path) -> DataShape | None:
    """Look at the class folders and the first image of ``root/train``."""
    try:
        train = root.expanduser() / "train"
        return _first_image(train, train.stat().st_mtime_ns)
    except (OSError, ValueError, RuntimeError):  # the last: a "~name" whose home is unknown
        return None


@lru_cache(maxsize=16)
def _first_image(train: Path, changed_ns: int) -> DataShape:
    """The shape of a folder's images. Every trial of a study asks, so the answer is kept.

    ``changed_ns`` is when class folders last came or went, and part of the key. Raises OSError
    or ValueError where there is no readable image, which is not kept.
    """
    from PIL import Image  # kept out of the start-up of commands that read no image folder

    classes = sorted(entry for entry in train.iterdir() if entry.is_dir())
    files = (file for folder in classes for file in sorted(folder.iterdir()))
    first = next((file for file in files if file.suffix.lower() in IMAGE_SUFFIXES), None)
    if first is None:
        raise FileNotFoundError(f"{train} has no images")
    try:
        with Image.open(first) as image:
            channels = 1 if image.mode in {"1", "L", "I;16", "LA"} else 3
            return DataShape(channels, image.height, image.width, len(classes))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error

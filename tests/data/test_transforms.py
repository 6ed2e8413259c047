"""Every batched transformation against torchvision's, image by image, same parameters.

Tolerances: bytes are equal up to one level of 255, and equal in at least 99.5 % of all values;
floats differ by at most 1e-5 (2e-4 for rotation, whose sampling positions are rounded).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from sweeper.data import transforms

COUNT = 24


def make_images(channels: int, dtype: torch.dtype) -> Tensor:
    """Noise, gradients and flat images: ties between channels, black and white included."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, channels, 12, 17), generator=generator)
    ramp = torch.linspace(0, 255, 17).long().expand(12, 17)
    images[0], images[1], images[2] = 0, 255, ramp
    images[3, 0], images[3, 1:] = 200, 100
    images[4, -1], images[4, :-1] = 30, ramp
    return images.to(torch.uint8) if dtype == torch.uint8 else images.to(dtype) / 255


def compare(ours: Tensor, theirs: Tensor, *, atol: float) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if ours.dtype == torch.uint8:
        difference = (ours.int() - theirs.int()).abs()
        assert difference.max() <= 1
        assert (difference == 0).double().mean() >= 0.995
    else:
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


Pair = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, float], Tensor]]

FACTORS: dict[str, Pair] = {
    "brightness": (transforms.adjust_brightness, reference.adjust_brightness),
    "contrast": (transforms.adjust_contrast, reference.adjust_contrast),
    "saturation": (transforms.adjust_saturation, reference.adjust_saturation),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FACTORS)
def test_colour_factors(name: str, channels: int, dtype: torch.dtype) -> None:
    ours, theirs = FACTORS[name]
    images = make_images(channels, dtype)
    factors = torch.linspace(0, 2, COUNT)
    expected = [theirs(image, f.item()) for image, f in zip(images, factors, strict=True)]
    compare(ours(images, factors), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_hue(channels: int, dtype: torch.dtype) -> None:
    images = make_images(channels, dtype)
    shifts = torch.linspace(-0.5, 0.5, COUNT)
    expected = [
        reference.adjust_hue(image, s.item()) for image, s in zip(images, shifts, strict=True)
    ]
    compare(transforms.adjust_hue(images, shifts), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_rotation(channels: int, dtype: torch.dtype) -> None:
    images = make_images(channels, dtype)
    degrees = torch.linspace(-179, 179, COUNT)
    expected = [
        reference.rotate(image, d.item(), interpolation=InterpolationMode.BILINEAR)
        for image, d in zip(images, degrees, strict=True)
    ]
    compare(transforms.rotate(images, degrees), torch.stack(expected), atol=2e-4)


def test_rotation_by_0_gives_the_image_back() -> None:
    images = make_images(3, torch.uint8)
    assert torch.equal(transforms.rotate(images, torch.zeros(COUNT)), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [1, 4, 20])
def test_crop_is_exact(padding: int, dtype: torch.dtype) -> None:
    images = make_images(3, dtype)
    generator = torch.Generator().manual_seed(1)
    top = torch.randint(2 * padding + 1, (COUNT,), generator=generator)
    left = torch.randint(2 * padding + 1, (COUNT,), generator=generator)
    top[0], left[0], top[1], left[1] = 0, 2 * padding, 2 * padding, 0
    expected = [
        reference.crop(reference.pad(image, [padding]), int(t), int(s), 12, 17)
        for image, t, s in zip(images, top, left, strict=True)
    ]
    assert torch.equal(transforms.crop(images, top, left, padding), torch.stack(expected))


@pytest.mark.parametrize("padding", [0, 2])
def test_crop_to_another_size_is_exact(padding: int) -> None:
    images = make_images(3, torch.uint8)
    generator = torch.Generator().manual_seed(1)
    top = torch.randint(12 + 2 * padding - 9 + 1, (COUNT,), generator=generator)
    left = torch.randint(17 + 2 * padding - 11 + 1, (COUNT,), generator=generator)
    expected = [
        reference.crop(reference.pad(image, [padding]), int(t), int(s), 9, 11)
        for image, t, s in zip(images, top, left, strict=True)
    ]
    assert torch.equal(transforms.crop(images, top, left, padding, (9, 11)), torch.stack(expected))


@pytest.mark.parametrize("height", range(1, 13))
def test_centre_crop_is_exact(height: int) -> None:
    images = make_images(3, torch.uint8)
    for width in range(1, 18):
        expected = reference.center_crop(images, [height, width])
        assert torch.equal(transforms.centre_crop(images, (height, width)), expected)


def test_the_middle_crop_is_the_image() -> None:
    images = make_images(3, torch.uint8)
    middle = torch.full((COUNT,), 4)
    assert torch.equal(transforms.crop(images, middle, middle, 4), images)


def test_flip_is_exact() -> None:
    images = make_images(3, torch.uint8)
    flipped = torch.arange(COUNT) % 3 == 0
    expected = [
        reference.horizontal_flip(image) if f else image
        for image, f in zip(images, flipped, strict=True)
    ]
    assert torch.equal(transforms.flip(images, flipped), torch.stack(expected))

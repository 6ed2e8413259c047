"""Random augmentation of batches on their device: draws here, image arithmetic in ``transforms``.

Shapes: ``B`` images, ``C`` channels, ``H`` height, ``W`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sweeper.config.data import ColorJitter, Crop, Flip, Rotation
from sweeper.data import transforms

Step = Crop | Flip | ColorJitter | Rotation

_CHUNK_VALUES: Final = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Values a pass works on at once: what fits a CPU's cache, and 64 MiB of float32 on a GPU."""


@dataclass(frozen=True)
class Augment:
    """The augmentations of a ``data`` section, each image with its own random parameters.

    Steps are applied in the order of the study file, and the parts of ``color_jitter`` always as
    brightness, contrast, saturation, hue (torchvision shuffles these four anew each time). All
    draws come from one generator on the images' device, so a seeded one repeats them.

    Nothing waits for the device and no shape depends on data: a call may be captured in a CUDA
    graph, with ``generator=None`` (the device's default one, which a graph advances at each
    replay) or with a generator registered with the graph.

    Evaluation needs no counterpart: the centre crop of an image padded on all sides, in the
    image's own size, is the image itself, and where a crop has a size of its own, the images that
    are evaluated are cut to it when they are loaded.
    """

    steps: tuple[Step, ...] = ()

    @property
    def identity(self) -> bool:
        """True where there is nothing to do: images come back as the same object."""
        return not self.steps

    def __call__(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images, augmented, in the same dtype: uint8 or float ``[B, C, H, W]``.

        The shape changes only by a crop with a size of its own.

        A whole epoch at once is fine: the work is done in pieces, one step after the other.
        """
        for step in self.steps:
            images_BCHW = _apply(step, images_BCHW, generator)
        return images_BCHW


def _apply(step: Step, images_BCHW: Tensor, generator: torch.Generator | None) -> Tensor:
    draw = _Draw(count=len(images_BCHW), device=images_BCHW.device, generator=generator)
    match step:
        case Crop(padding=padding, size=side):
            rows, columns = images_BCHW.shape[-2:]
            height, width = (rows, columns) if side is None else (side, side)
            top_B = draw.integers(rows + 2 * padding - height + 1)
            left_B = draw.integers(columns + 2 * padding - width + 1)
            return _in_pieces(
                lambda x, top, left: transforms.crop(x, top, left, padding, (height, width)),
                images_BCHW,
                top_B,
                left_B,
            )
        case Flip(p=p):
            return _in_pieces(transforms.flip, images_BCHW, draw.uniform(0, 1) < p)
        case ColorJitter():
            return _jitter(step, images_BCHW, draw)
        case Rotation(degrees=degrees):
            return _in_pieces(transforms.rotate, images_BCHW, draw.uniform(-degrees, degrees))


def _jitter(step: ColorJitter, images_BCHW: Tensor, draw: _Draw) -> Tensor:
    """Each strength ``s`` draws a factor from ``max(0, 1 - s)`` to ``1 + s``; hue a shift ±s."""
    adjustments: list[Callable[[Tensor, Tensor], Tensor]] = []
    parameters: list[Tensor] = []
    for strength, adjust in (
        (step.brightness, transforms.adjust_brightness),
        (step.contrast, transforms.adjust_contrast),
        (step.saturation, transforms.adjust_saturation),
    ):
        if strength > 0:
            adjustments.append(adjust)
            parameters.append(draw.uniform(max(0.0, 1 - strength), 1 + strength))
    if step.hue > 0:
        adjustments.append(transforms.adjust_hue)
        parameters.append(draw.uniform(-step.hue, step.hue))

    def jitter(piece: Tensor, *values: Tensor) -> Tensor:
        for adjust, value in zip(adjustments, values, strict=True):
            piece = adjust(piece, value)
        return piece

    return _in_pieces(jitter, images_BCHW, *parameters)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draw:
    """Random numbers on a device, one for each of ``count`` images."""

    count: int
    device: torch.device
    generator: torch.Generator | None

    def uniform(self, low: float, high: float) -> Tensor:
        values_B = torch.rand(self.count, generator=self.generator, device=self.device)
        return values_B * (high - low) + low

    def integers(self, end: int) -> Tensor:
        return torch.randint(end, (self.count,), generator=self.generator, device=self.device)


def _in_pieces(
    function: Callable[..., Tensor], images_BCHW: Tensor, *parameters_B: Tensor
) -> Tensor:
    """``function(images, *parameters)``, so many images at a time that its temporaries stay small.

    The number of images decides the pieces, never their content.
    """
    limit = _CHUNK_VALUES.get(images_BCHW.device.type, 1 << 18)
    size = max(1, limit // images_BCHW.shape[1:].numel())
    if len(images_BCHW) <= size:
        return function(images_BCHW, *parameters_B)
    pieces = [slice(start, start + size) for start in range(0, len(images_BCHW), size)]
    result: Tensor | None = None
    for piece in pieces:
        part = function(images_BCHW[piece], *(values[piece] for values in parameters_B))
        if result is None:
            result = part.new_empty(len(images_BCHW), *part.shape[1:])
        result[piece] = part
    return images_BCHW if result is None else result

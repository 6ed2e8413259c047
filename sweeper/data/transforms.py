"""Batched image transformations with one parameter an image, as torchvision does them one by one.

Shapes: ``B`` images, ``C`` channels (1 or 3), ``H`` height, ``W`` width, ``P`` padding.

Images are uint8 (0 to 255) or float (0 to 1), and come back in the shape and dtype they had.
Every function does for image ``b`` what its namesake in ``torchvision.transforms.v2.functional``
does with parameter ``b``, rounding and clipping included; results differ by float rounding only
(one level of 255 at most, where a value lies on the edge between two). No function waits for the
device, copies from the host or has a shape that depends on data: all may be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

RED_WEIGHT, GREEN_WEIGHT, BLUE_WEIGHT = 0.2989, 0.587, 0.114


def crop(
    images_BCHW: Tensor,
    top_B: Tensor,
    left_B: Tensor,
    padding: int,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Pad with ``P`` zeros all round, then cut ``size`` (height, width) out at ``top``, ``left``.

    ``size`` None: the images' own. ``top_B`` and ``left_B`` are int64, 0 to ``H + 2P - height`` and
    ``W + 2P - width``; half of that is the middle, which gives an image of its own size back.
    """
    height, width = size or images_BCHW.shape[-2:]
    padded = functional.pad(images_BCHW, (padding,) * 4)
    windows_BTLCHW = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    index_B = torch.arange(len(images_BCHW), device=images_BCHW.device)
    return windows_BTLCHW[index_B, top_B, left_B]


def centre_crop(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of the images in ``size`` (height, width), not larger than they: a view.

    Where the middle lies between two pixels, as torchvision: the even one of the two.
    """
    (height, width), (rows, columns) = size, images_BCHW.shape[-2:]
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    return images_BCHW[..., top : top + height, left : left + width]


def flip(images_BCHW: Tensor, flipped_B: Tensor) -> Tensor:
    """Mirror left and right where ``flipped_B`` (bool) is set."""
    return torch.where(_per_image(flipped_B), images_BCHW.flip(-1), images_BCHW)


def adjust_brightness(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Multiply every value by ``factor`` (0 is black, 1 the image itself)."""
    x_BCHW = _as_float(images_BCHW)
    return _clipped(x_BCHW * _per_image(factor_B), images_BCHW)


def adjust_contrast(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Blend with the mean of the image's own grey version (0 is flat, 1 the image itself)."""
    mean_B111 = _grey(images_BCHW).mean((1, 2, 3), keepdim=True)
    return _blend(images_BCHW, mean_B111, factor_B)


def adjust_saturation(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Blend with the grey version (0 is grey, 1 the image itself). Grey images stay."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    return _blend(images_BCHW, _grey(images_BCHW), factor_B)


def adjust_hue(images_BCHW: Tensor, shift_B: Tensor) -> Tensor:
    """Turn the hue by ``shift`` of the colour circle, -0.5 to 0.5. Grey images stay."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    x_BCHW = _as_float(images_BCHW)
    if not images_BCHW.is_floating_point():
        x_BCHW = x_BCHW / 255
    red, green, blue = x_BCHW.unbind(1)
    low, value = x_BCHW.aminmax(dim=1)
    chroma = value - low
    divisor = torch.where(chroma == 0, 1, chroma)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sextant = sextant + 6 * shift_B.view(-1, 1, 1)
    # HSV to RGB in closed form: each channel is the value less the chroma times a trapezoid of
    # the hue, the same trapezoid at a third of the circle's distance.
    channels = []
    for offset in (5, 3, 1):
        k = (sextant + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    turned_BCHW = torch.stack(channels, 1)
    if images_BCHW.is_floating_point():
        return turned_BCHW
    return (turned_BCHW * (256 - 1e-3)).to(images_BCHW.dtype)  # as torchvision converts to uint8


def rotate(images_BCHW: Tensor, degrees_B: Tensor) -> Tensor:
    """Turn counter-clockwise about the centre: bilinear, zeros beyond the border, size kept."""
    height, width = images_BCHW.shape[-2:]
    device, x_BCHW = images_BCHW.device, _as_float(images_BCHW)
    dtype = x_BCHW.dtype
    x_W = torch.linspace((1 - width) / 2, (width - 1) / 2, width, dtype=dtype, device=device)
    y_H1 = torch.linspace((1 - height) / 2, (height - 1) / 2, height, dtype=dtype, device=device)
    y_H1 = y_H1.unsqueeze(1)
    radians_B11 = torch.deg2rad(degrees_B.to(dtype)).view(-1, 1, 1)
    cosine, sine = radians_B11.cos(), radians_B11.sin()
    source_x_BHW = (cosine * x_W - sine * y_H1) * (2 / width)
    source_y_BHW = (sine * x_W + cosine * y_H1) * (2 / height)
    grid_BHW2 = torch.stack((source_x_BHW, source_y_BHW), -1)
    turned_BCHW = functional.grid_sample(
        x_BCHW, grid_BHW2, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    if images_BCHW.is_floating_point():
        return turned_BCHW
    return turned_BCHW.round().to(images_BCHW.dtype)


def _per_image(values_B: Tensor) -> Tensor:
    return values_B.view(-1, 1, 1, 1)


def _as_float(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float()


def _grey(images_BCHW: Tensor) -> Tensor:
    """Float ``[B, 1, H, W]`` on the images' own scale, cut to whole levels for uint8."""
    if images_BCHW.shape[1] == 1:
        return _as_float(images_BCHW)
    red, green, blue = _as_float(images_BCHW).unbind(1)
    grey = (red * RED_WEIGHT + green * GREEN_WEIGHT + blue * BLUE_WEIGHT).unsqueeze(1)
    return grey if images_BCHW.is_floating_point() else grey.floor()


def _blend(images_BCHW: Tensor, other: Tensor, ratio_B: Tensor) -> Tensor:
    ratio = _per_image(ratio_B)
    return _clipped(_as_float(images_BCHW) * ratio + other * (1 - ratio), images_BCHW)


def _clipped(values: Tensor, like: Tensor) -> Tensor:
    """``values`` cut to the range of ``like`` and, as torchvision does, truncated to its dtype."""
    return values.clamp(0, 1 if like.is_floating_point() else 255).to(like.dtype)

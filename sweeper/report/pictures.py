"""Weights as pictures: every picture scaled to 0–1 by itself, as small as its numbers are.

Shapes: n pictures, C channels (1 or 3), H and W of a picture, p side of a patch, N patches,
T positions, D width of an embedding.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sweeper.config.data import DataShape, shape_of
from sweeper.config.model import Mixer, Mlp, ModelConfig, Vit
from sweeper.report.blocks import Gallery, Picture
from sweeper.report.model import Weights
from sweeper.report.wording import plural

Pixels = NDArray[np.float32]

_WIDTH_PX: Final = 640
_HEIGHT_PX: Final = 520
_TIMES_AT_MOST: Final = 24
_POSITION_PX: Final = 8
_KERNELS_AT_MOST: Final = 64
_UNITS_AT_MOST: Final = 1024
_LEAST_PIXELS: Final = 9
_FIRST_LAYERS: Final = ("conv1.weight", "stages.0.0.weight")
_PATCHES: Final = "stem.projection.weight"
_UNITS: Final = "layers.0.weight"
_TOKENS: Final = "blocks.0.token_mlp.up.weight"
_ENCODINGS: Final = ((100, 16), (1000, 160))
"""Positions and width of the encodings that report R1c draws."""


def weight_galleries(weights: Weights) -> list[Gallery]:
    """The pictures that the model's family has: first layer, token mixing, positions."""
    model = weights.config.model
    shape = shape_of(weights.config.data)
    arrays = {name: tensor.float().numpy() for name, tensor in weights.tensors.items()}
    found = [_first_layer(arrays, model, shape)]
    if isinstance(model, Mixer):
        found.append(_token_mixing(arrays, model, shape))
    if isinstance(model, Vit):
        found.append(_positions(arrays, model, shape))
    return [gallery for gallery in found if gallery is not None]


def _first_layer(
    arrays: Mapping[str, Pixels], model: ModelConfig, shape: DataShape | None
) -> Gallery | None:
    """The kernels that see the image itself: in colour, and averaged over channels."""
    kernels_nCHW = _kernels(arrays, model, shape)
    if kernels_nCHW is None or kernels_nCHW[0, 0].size < _LEAST_PIXELS:
        return None
    count, channels, height, width = kernels_nCHW.shape
    shown = kernels_nCHW[:_KERNELS_AT_MOST]
    many = f"the first {len(shown)} of {count}" if count > len(shown) else f"all {count}"
    pictures = []
    if channels == 3:
        pictures.append(tiled(shown, f"{many} kernels of the first layer in colour", "in colour"))
    averaged = shown.mean(axis=1, keepdims=True)
    grey = "averaged over channels" if channels > 1 else ""
    pictures.append(tiled(averaged, f"{many} kernels of the first layer {grey}".strip(), grey))
    where = "Patch embedding" if isinstance(model, Mixer | Vit) else "First layer"
    kind = "units" if isinstance(model, Mlp) else "kernels"
    return Gallery(
        title=f"{where}: {plural(count, kind.removesuffix('s'))} of {height}×{width}",
        caption=f"Weights of {many} {kind}, each scaled to 0–1 by itself.",
        pictures=tuple(pictures),
    )


def _kernels(
    arrays: Mapping[str, Pixels], model: ModelConfig, shape: DataShape | None
) -> Pixels | None:
    """First-layer weights [n, C, H, W]: of a convolution, a patch embedding or an MLP."""
    for name in _FIRST_LAYERS:
        if name in arrays and arrays[name].ndim == 4:
            return arrays[name]
    if shape is None:
        return None
    if isinstance(model, Mixer | Vit) and _PATCHES in arrays:
        return arrays[_PATCHES].reshape(-1, shape.channels, model.patch, model.patch)
    if isinstance(model, Mlp) and _UNITS in arrays:
        return arrays[_UNITS].reshape(-1, *shape[:3])
    return next(
        (each for each in arrays.values() if each.ndim == 4 and each.shape[1] == shape.channels),
        None,
    )


def _token_mixing(
    arrays: Mapping[str, Pixels], model: Mixer, shape: DataShape | None
) -> Gallery | None:
    """One picture a hidden unit of the first token MLP: how it weighs the patches (R4.6)."""
    if shape is None or _TOKENS not in arrays:
        return None
    grid = (shape.height // model.patch, shape.width // model.patch)
    units_nHW = arrays[_TOKENS].reshape(-1, *grid)
    if units_nHW[0].size < 4:
        return None
    shown = units_nHW[:_UNITS_AT_MOST, None]
    size = f"{grid[0]}×{grid[1]}"
    return Gallery(
        title=f"Token mixing of the first block: {plural(len(units_nHW), 'hidden unit')}",
        caption=f"One picture a hidden unit, its weight for each of the {size} patches, "
        "each scaled to 0–1 by itself.",
        pictures=(tiled(shown, f"token-mixing weights of {len(shown)} hidden units, {size} each"),),
    )


def _positions(arrays: Mapping[str, Pixels], model: Vit, shape: DataShape | None) -> Gallery | None:
    """The encoding that the model adds; of a sinusoidal one also the report's two examples."""
    from sweeper.models import sinusoidal_encoding

    if model.position == "none" or shape is None:
        return None
    pictures = []
    patches = (shape.height // model.patch) * (shape.width // model.patch)
    if model.position == "learned":
        own_TD = arrays.get("position")
        if own_TD is None:
            return None
        sizes: Sequence[tuple[int, int]] = ()
    else:
        own_TD = sinusoidal_encoding(patches + 1, model.embed_dim).numpy()
        sizes = _ENCODINGS
    pictures.append(_encoding(own_TD, "this model's"))
    pictures += [_encoding(sinusoidal_encoding(*size).numpy(), "report R1c's") for size in sizes]
    return Gallery(
        title=f"Position encoding, {model.position}",
        caption="Positions from left to right, dimensions from top to bottom, scaled to 0–1.",
        pictures=tuple(pictures),
    )


def _encoding(encoding_TD: Pixels, whose: str) -> Picture:
    positions, width = encoding_TD.shape
    said = f"{whose} {positions} positions × {width}"
    return picture(
        scaled(encoding_TD.T[None]),
        f"position encoding, {said}",
        said,
        width_px=min(_WIDTH_PX, _POSITION_PX * positions),  # of two positions no tall tower
    )


def scaled(picture_CHW: Pixels) -> Pixels:
    """``picture_CHW`` moved and stretched to 0–1; a constant one becomes 0.5."""
    low, high = float(picture_CHW.min()), float(picture_CHW.max())
    if not np.isfinite(low) or not np.isfinite(high) or high - low < 1e-12:
        return np.full_like(picture_CHW, 0.5)
    return (picture_CHW - low) / (high - low)


def tiled(pictures_nCHW: Pixels, alt: str, caption: str = "") -> Picture:
    """All pictures in one, a clear pixel between them, each scaled by itself."""
    count, _, height, width = pictures_nCHW.shape
    columns = min(count, 8 if count <= 32 else 16 if count <= 256 else 32)
    rows = -(-count // columns)
    whole = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 4), np.uint8)
    for index, each_CHW in enumerate(pictures_nCHW):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        pixels = _bytes(scaled(each_CHW))
        whole[top : top + height, left : left + width, :3] = pixels
        whole[top : top + height, left : left + width, 3] = 255
    return _picture(whole, alt, caption)


def picture(picture_CHW: Pixels, alt: str, caption: str = "", **more: Any) -> Picture:
    """One picture whose values are in 0–1, [1 or 3, H, W]."""
    return _picture(_bytes(picture_CHW), alt, caption, **more)


def _bytes(picture_CHW: Pixels) -> NDArray[np.uint8]:
    """[1 or 3, H, W] in 0–1 as [H, W, 3] in 0–255."""
    pixels = (np.clip(picture_CHW, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if pixels.shape[2] == 1 else pixels


def _picture(
    pixels: NDArray[np.uint8], alt: str, caption: str, *, width_px: int = _WIDTH_PX, **more: Any
) -> Picture:
    """A PNG inside the page, shown a whole number of times as large as it is."""
    height, width = pixels.shape[:2]
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", optimize=True)
    times = max(1, min(_TIMES_AT_MOST, width_px // width, _HEIGHT_PX // height))
    return Picture(
        source="data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii"),
        alt=alt,
        caption=caption,
        width_px=width * times,
        height_px=height * times,
        **more,
    )

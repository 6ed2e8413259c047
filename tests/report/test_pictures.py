"""Weights become pictures: the right ones, in the right order, each scaled by itself."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from report.conftest import row

from sweeper.config import TrialConfig, shape_of
from sweeper.models import build, sinusoidal_encoding
from sweeper.report.blocks import Gallery, Picture
from sweeper.report.model import Weights
from sweeper.report.pictures import picture, scaled, tiled, weight_galleries


def pixels(picture: Picture) -> NDArray[np.uint8]:
    prefix, _, encoded = picture.source.partition(",")
    assert prefix == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def galleries(data: str, **model: object) -> tuple[list[Gallery], Weights]:
    config = TrialConfig.model_validate({"data": {"name": data}, "model": model})
    network = build(config.model, shape_of(config.data), seed=0)  # type: ignore[arg-type]  # known
    weights = Weights(trial=row(0), run_id="", config=config, tensors=network.state_dict())
    return weight_galleries(weights), weights


def test_scaling_reaches_from_0_to_1_and_keeps_the_order() -> None:
    values = np.array([[[-3.0, 1.0], [0.0, 5.0]]], np.float32)
    assert scaled(values).tolist() == [[[0.0, 0.5], [0.375, 1.0]]]
    assert scaled(np.ones((1, 2, 2), np.float32)).tolist() == [[[0.5, 0.5], [0.5, 0.5]]]
    assert np.isfinite(scaled(np.array([[[np.nan, 1.0]]], np.float32))).all()


def test_tiles_stand_in_rows_with_a_clear_pixel_between() -> None:
    tiles = np.arange(9 * 4, dtype=np.float32).reshape(9, 1, 2, 2)
    found = pixels(tiled(tiles, "nine"))
    assert found.shape == (5, 8 * 3 - 1, 4)
    assert found[:2, 0:2, 0].tolist() == [[0, 85], [170, 255]]
    assert (found[:, 2, 3] == 0).all()
    assert (found[2, :, 3] == 0).all()
    assert (found[3:, :2, 3] == 255).all()
    assert (found[3:, 3:, 3] == 0).all()  # no tenth


def test_a_resnet_has_64_kernels_in_colour_and_averaged() -> None:
    (gallery,), weights = galleries("cifar10", name="resnet18")
    assert gallery.title == "First layer: 64 kernels of 3×3"
    colour, grey = gallery.pictures
    assert pixels(colour).shape == pixels(grey).shape == (4 * 4 - 1, 16 * 4 - 1, 4)
    kernel = weights.tensors["conv1.weight"][17].numpy()  # in the second row, the second
    wanted = (scaled(kernel) * 255).round().transpose(1, 2, 0)
    assert pixels(colour)[4:7, 4:7, :3].tolist() == wanted.astype(int).tolist()
    mean = scaled(kernel.mean(0, keepdims=True))[0] * 255
    assert pixels(grey)[4:7, 4:7, 0] == pytest.approx(mean, abs=0.51)


def test_a_mixer_has_one_picture_of_the_patches_a_hidden_unit() -> None:
    found, weights = galleries("cifar10", name="mixer", patch=4, embed_dim=256, blocks=1)
    gallery = found[-1]
    assert gallery.title == "Token mixing of the first block: 128 hidden units"
    assert pixels(gallery.pictures[0]).shape == (8 * 9 - 1, 16 * 9 - 1, 4)
    unit = weights.tensors["blocks.0.token_mlp.up.weight"][1].numpy().reshape(1, 8, 8)
    shown = pixels(gallery.pictures[0])[:8, 9:17, 0]
    assert shown == pytest.approx(scaled(unit)[0] * 255, abs=0.51)


def test_a_vit_has_the_reports_encodings_and_its_own() -> None:
    found, _ = galleries("mnist", name="vit", patch=14, embed_dim=32)
    shapes = [pixels(each).shape[:2] for each in found[-1].pictures]
    assert shapes == [(32, 5), (16, 100), (160, 1000)]
    shown = pixels(found[-1].pictures[1])[:, :, 0]
    wanted = scaled(sinusoidal_encoding(100, 16).numpy().T[None])[0] * 255
    assert shown == pytest.approx(wanted, abs=0.51)
    learned, _ = galleries("mnist", name="vit", patch=14, position="learned")
    assert [pixels(each).shape[:2] for each in learned[-1].pictures] == [(32, 5)]
    none, _ = galleries("mnist", name="vit", patch=14, position="none")
    assert [each.title for each in none] == ["Patch embedding: 32 kernels of 14×14"]


def test_points_in_the_plane_have_no_pictures() -> None:
    assert galleries("circles", name="mlp")[0] == []


def test_a_picture_is_shown_a_whole_number_of_times_as_large() -> None:
    shown = picture(np.zeros((3, 28, 28), np.float32), "black", width_px=112)
    assert (shown.width_px, shown.height_px) == (112, 112)
    assert picture(np.zeros((1, 900, 700), np.float32), "large").width_px == 700

"""Standardisation: statistics, exactness, degenerate images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sweeper.data.standardize import Standardize, channel_statistics
from sweeper.errors import UsageError


@pytest.fixture
def images() -> torch.Tensor:
    """Channels of different brightness and spread, neighbouring pixels correlated."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(600, 3, 4, 4, generator=generator)
    smooth = base + 0.8 * base.roll(1, 3)
    scale = torch.tensor([20.0, 35.0, 50.0]).view(3, 1, 1)
    centre = torch.tensor([90.0, 128.0, 140.0]).view(3, 1, 1)
    return (smooth * scale + centre).clamp(0, 255).to(torch.uint8)


def test_none_brings_bytes_to_the_unit_interval_exactly(images: torch.Tensor) -> None:
    standardized = Standardize.fit(images, "none")(images)
    assert standardized.dtype == torch.float32
    assert torch.equal(standardized, images.float() / 255)


def test_none_leaves_points_as_they_are() -> None:
    points = torch.randn(50, 1, 1, 2)
    assert torch.equal(Standardize.fit(points, "none")(points), points)


def test_channel_gives_mean_0_and_deviation_1(images: torch.Tensor) -> None:
    standardized = Standardize.fit(images, "channel")(images)
    torch.testing.assert_close(standardized.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    deviation = standardized.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(3), atol=1e-5, rtol=0)


def test_statistics_are_those_of_numpy_in_float64(images: torch.Tensor) -> None:
    mean, std = channel_statistics(images)
    array = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, array.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(std, array.std((0, 2, 3)), rtol=1e-12)


def test_floats_and_bytes_of_the_same_image_come_out_equal(images: torch.Tensor) -> None:
    for kind in ("none", "channel", "zca"):
        standardize = Standardize.fit(images, kind)
        torch.testing.assert_close(
            standardize(images), standardize(images.float() / 255), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("kind", ["none", "channel", "zca"])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_channel_is_finite(kind: str, value: int) -> None:
    images = torch.randint(0, 256, (100, 3, 4, 4), dtype=torch.uint8)
    images[:, 1] = value
    standardize = Standardize.fit(images, kind)  # type: ignore[arg-type]  # parametrised text
    assert standardize(images).isfinite().all()
    if kind == "channel":
        assert (standardize(images)[:, 1] == 0).all()


def test_a_single_colour_data_set_is_finite_under_zca() -> None:
    images = torch.full((20, 1, 4, 4), 9, dtype=torch.uint8)
    assert Standardize.fit(images, "zca")(images).abs().max() < 1e-6


def test_zca_makes_the_covariance_the_identity(images: torch.Tensor) -> None:
    whitened = Standardize.fit(images, "zca", epsilon=1e-6)(images).flatten(1).double()
    torch.testing.assert_close(
        whitened.T @ whitened / len(whitened), torch.eye(48).double(), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(whitened.mean(0), torch.zeros(48).double(), atol=1e-4, rtol=0)


def test_zca_stays_closest_to_the_image_of_all_whitenings(images: torch.Tensor) -> None:
    """A symmetric matrix: what tells ZCA from PCA whitening, which would scramble pixels."""
    whitening = Standardize.fit(images, "zca").whitening
    assert whitening is not None
    torch.testing.assert_close(whitening, whitening.T, atol=1e-5, rtol=0)


def test_a_larger_epsilon_amplifies_small_components_less(images: torch.Tensor) -> None:
    norms = [
        torch.linalg.matrix_norm(Standardize.fit(images, "zca", epsilon=e).whitening, 2).item()
        for e in (1e-4, 1e-2, 1.0)
    ]
    assert norms == sorted(norms, reverse=True)


def test_zca_of_large_images_is_refused_with_a_way_out() -> None:
    images = torch.zeros(10, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(UsageError, match=r"at most 8192 values.*12288 \(3x64x64\); use channel"):
        Standardize.fit(images, "zca")


def test_zca_reads_a_spread_sample_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeper.data.standardize.ZCA_IMAGES", 50)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 128, (1000, 1, 2, 2), generator=generator, dtype=torch.uint8)
    images[500:] += 128  # sorted by brightness: the first 50 alone would miss half of it
    mean = -Standardize.fit(images, "zca").shift
    torch.testing.assert_close(mean.mean(), torch.tensor(0.5), atol=0.05, rtol=0)


def test_state_restores_it(images: torch.Tensor) -> None:
    fitted = Standardize.fit(images, "zca")
    other = Standardize.fit(255 - images, "zca")
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other(images), fitted(images))


def test_autocast_does_not_coarsen_whitening(images: torch.Tensor) -> None:
    standardize = Standardize.fit(images, "zca")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = standardize(images)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, standardize(images))


def test_double_gives_float64(images: torch.Tensor) -> None:
    assert Standardize.fit(images, "zca").double()(images).dtype == torch.float64

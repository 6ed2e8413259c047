"""Random augmentation: what is drawn, for whom, and that it repeats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sweeper.config.data import ColorJitter, Crop, Flip, Rotation
from sweeper.data import Augment
from sweeper.data.augment import Step
from sweeper.data.standardize import Standardize

ALL = Augment((Crop(padding=2), Flip(), ColorJitter(hue=0.1), Rotation(degrees=20.0)))
STEPS: list[Step] = [Crop(padding=3), Flip(), ColorJitter(hue=0.2), Rotation(degrees=30.0)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def repeated(count: int, channels: int = 3) -> Tensor:
    """The same image ``count`` times."""
    image = torch.randint(0, 256, (1, channels, 10, 10), generator=seeded(), dtype=torch.uint8)
    return image.repeat(count, 1, 1, 1)


def test_no_steps_cost_nothing() -> None:
    images = repeated(4)
    assert Augment().identity
    assert Augment()(images) is images
    assert not ALL.identity


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_shape_dtype_range_and_input_are_kept(
    step: Step, channels: int, dtype: torch.dtype
) -> None:
    images = repeated(8, channels)
    if dtype != torch.uint8:
        images = images.to(dtype) / 255
    before = images.clone()
    result = Augment((step,))(images, seeded())
    assert (result.shape, result.dtype) == (images.shape, dtype)
    assert result.min() >= 0
    assert result.max() <= (255 if dtype == torch.uint8 else 1 + 1e-6)
    assert torch.equal(images, before)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_each_image_has_its_own_draw(step: Step) -> None:
    result = Augment((step,))(repeated(64), seeded())
    distinct = len(torch.unique(result.flatten(1), dim=0))
    assert distinct == 2 if isinstance(step, Flip) else distinct > 30


@pytest.mark.parametrize("step", [*STEPS, None], ids=lambda step: step.name if step else "all")
def test_a_seed_repeats_and_another_does_not(step: Step | None) -> None:
    augment = ALL if step is None else Augment((step,))
    images = repeated(32)
    first = augment(images, seeded(1))
    assert torch.equal(first, augment(images, seeded(1)))
    assert not torch.equal(first, augment(images, seeded(2)))


def test_without_a_generator_the_default_one_is_used() -> None:
    images = repeated(32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = ALL(images)
        second = ALL(images)
        torch.manual_seed(5)
        assert torch.equal(first, ALL(images))
    assert not torch.equal(first, second)


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    images = repeated(37)
    whole = ALL(images, seeded())
    monkeypatch.setattr("sweeper.data.augment._CHUNK_VALUES", {"cpu": 5 * 300})
    assert torch.equal(ALL(images, seeded()), whole)


def test_crop_reaches_every_offset_evenly() -> None:
    images = torch.zeros(5000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    moved = Augment((Crop(padding=2),))(images, seeded()).flatten(1).argmax(1)
    counts = torch.bincount(moved, minlength=81).view(9, 9)
    assert (counts[2:7, 2:7] > 130).all()  # 200 expected at each of 25 places
    assert counts[2:7, 2:7].sum() == 5000


def test_crop_to_another_size_reaches_every_offset_evenly() -> None:
    images = torch.zeros(3600, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 255
    cut = Augment((Crop(padding=0, size=7),))(images, seeded())
    assert cut.shape == (3600, 1, 7, 7)
    counts = torch.bincount(cut.flatten(1).argmax(1), minlength=49).view(7, 7)
    assert (counts[2:5, 2:5] > 320).all()  # 400 expected at each of 9 places
    assert counts[2:5, 2:5].sum() == 3600


def test_pieces_of_another_size_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    images = repeated(37)
    augment = Augment((Crop(padding=1, size=8), Flip()))
    whole = augment(images, seeded())
    assert whole.shape == (37, 3, 8, 8)
    monkeypatch.setattr("sweeper.data.augment._CHUNK_VALUES", {"cpu": 5 * 300})
    assert torch.equal(augment(images, seeded()), whole)


@pytest.mark.parametrize(("p", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_flip_has_its_probability(p: float, share: float) -> None:
    images = repeated(3000)
    flipped = (Augment((Flip(p=p),))(images, seeded()) != images).flatten(1).any(1)
    assert flipped.double().mean().item() == pytest.approx(share, abs=0.04)


def test_jitter_factors_span_their_range() -> None:
    images = torch.full((2000, 3, 2, 2), 0.4)
    step = ColorJitter(brightness=0.5, contrast=0.0, saturation=0.0, hue=0.0)
    values = Augment((step,))(images, seeded())[:, 0, 0, 0]
    assert values.min() == pytest.approx(0.2, abs=0.005)
    assert values.max() == pytest.approx(0.6, abs=0.005)
    assert values.mean() == pytest.approx(0.4, abs=0.01)


def test_jitter_above_1_never_turns_negative() -> None:
    step = ColorJitter(brightness=3.0, contrast=3.0, saturation=3.0, hue=0.5)
    result = Augment((step,))(repeated(100).float() / 255, seeded())
    assert result.isfinite().all()
    assert (result >= 0).all() and (result <= 1).all()


def test_jitter_without_strength_changes_nothing() -> None:
    step = ColorJitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    images = repeated(10)
    assert torch.equal(Augment((step,))(images, seeded()), images)


def test_rotation_stays_within_its_degrees_on_both_sides() -> None:
    images = torch.zeros(500, 1, 41, 41)
    images[:, :, 20, 38] = 1.0  # 18 pixels right of the centre
    turned = Augment((Rotation(degrees=40.0),))(images, seeded())
    place = turned.flatten(1).argmax(1)
    up, right = 20 - place // 41, place % 41 - 20
    angles = torch.rad2deg(torch.atan2(up.double(), right.double()))
    half_a_pixel = math.degrees(0.75 / 18)
    assert angles.abs().max() <= 40 + half_a_pixel
    assert angles.min() < -35 and angles.max() > 35


class _Recorder(TorchDispatchMode):
    """The names of all operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_no_operation_waits_for_the_device_or_has_a_data_dependent_shape() -> None:
    """``.item()``, masks as indices and tensors made of Python lists cannot be captured."""
    images = repeated(16)
    standardize = Standardize.fit(images, "channel")
    with _Recorder() as recorder:
        standardize(ALL(images))
    assert "aten::grid_sampler_2d" in recorder.names  # the recorder sees what is done
    assert recorder.names.isdisjoint(
        {
            "aten::_local_scalar_dense",
            "aten::item",
            "aten::nonzero",
            "aten::masked_select",
            "aten::unique_dim",
            "aten::_unique2",
            "aten::lift_fresh",
            "aten::equal",
        }
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_draws_anew_at_each_replay() -> None:
    images = repeated(64).cuda()
    standardize = Standardize.fit(images, "channel")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        standardize(ALL(images))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = standardize(ALL(images))
    graph.replay()
    first = captured.clone()
    graph.replay()
    assert captured.isfinite().all()
    assert not torch.equal(first, captured)

"""Models of one's own: imported, checked, called, tried out."""

from __future__ import annotations

import random
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sweeper.config import DataShape
from sweeper.config.model import Custom
from sweeper.errors import UsageError
from sweeper.models import build, check_custom, parameter_count

SHAPE = DataShape(3, 8, 8, 5)
SOURCE = """
    import random
    import numpy as np
    from functools import partial
    import torch
    from torch import nn
    from sweeper.config import DataShape

    def linear(shape: DataShape, depth: int, *, bias: bool = True):
        layers = [nn.Linear(shape[0] * shape[1] * shape[2], shape.classes, bias)]
        layers += [nn.Linear(shape.classes, shape.classes, bias) for _ in range(depth)]
        return nn.Sequential(nn.Flatten(), *layers)

    class ByParts(nn.Module):
        def __init__(self, channels, height, width, classes, hidden=4):
            super().__init__()
            first = nn.Linear(channels * height * width, hidden)
            self.network = nn.Sequential(nn.Flatten(), first, nn.Linear(hidden, classes))

        def forward(self, x):
            return self.network(x)

    def anything(**kwargs):
        assert set(kwargs) == {"hidden"}, kwargs
        return ByParts(3, 8, 8, 5, **kwargs)

    def lazy(classes):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

    class ReadsValues(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.start = self.scale.item()
            self.head = nn.Linear(192, 5)

        def forward(self, x):
            return self.head(x.flatten(1)) * self.scale

    def uses_up(widths):
        layers = [nn.Flatten(), nn.Linear(192, widths[0])]
        while len(widths) > 1:
            layers.append(nn.Linear(widths.pop(0), widths[0]))
        return nn.Sequential(*layers)

    def drawn_otherwise(classes):
        head = nn.Linear(192, classes)
        with torch.no_grad():
            head.weight.copy_(torch.tensor(np.random.standard_normal((classes, 192))))
            head.bias.fill_(random.random())
        return nn.Sequential(nn.Flatten(), head)

    class Auxiliary(nn.Module):
        def __init__(self, classes, broken=False):
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(192, classes)
            self.drop = nn.Dropout()
            self.broken = broken
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            logits = self.head(self.drop(self.norm(x)).flatten(1))
            return (logits, logits) if self.training and self.broken else logits

    class Remembers(ByParts):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            pass

    def normalized(classes, old=False):
        layer = nn.Linear(192, classes)
        normalize = nn.utils.spectral_norm if old else nn.utils.parametrizations.weight_norm
        return nn.Sequential(nn.Flatten(), normalize(layer))

    def no_module():
        return [1, 2]

    def wrong_classes():
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    def wrong_input():
        return nn.Linear(7, 5)

    def several_outputs():
        return nn.LSTM(8, 5)

    def breaks():
        raise RuntimeError("no such thing")

    def by_position(first, /, second):
        return linear(DataShape(3, 8, 8, 5), 0)

    constant = 3
"""


@pytest.fixture(scope="module", autouse=True)
def _my_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder: Path = tmp_path_factory.mktemp("it's mine")
    (folder / "my_models.py").write_text(textwrap.dedent(SOURCE))
    (folder / "my_broken_models.py").write_text("import no_such_package_anywhere\n")
    (folder / "my_failing_models.py").write_text("1 / 0\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def section(factory: str, **arguments: Any) -> Custom:
    return Custom(name=f"my_models:{factory}", **arguments)


def test_a_factory_gets_its_arguments_and_the_shape() -> None:
    model = build(section("linear", depth=2, bias=False), SHAPE, seed=0)
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 192), (5, 5), (5, 5)]
    assert model(torch.zeros(3, 3, 8, 8)).shape == (3, 5)
    assert parameter_count(section("linear", depth=2, bias=False), SHAPE) == 5 * 192 + 50


def test_a_factory_that_names_parts_of_the_shape_gets_them() -> None:
    assert parameter_count(section("ByParts"), SHAPE) == 193 * 4 + 25


def test_arguments_of_the_section_come_before_those_of_the_data() -> None:
    with pytest.raises(UsageError, match=r"logits \[2, 5\], but it gave \[2, 9\]"):
        build(section("ByParts", classes=9), SHAPE)


def test_a_factory_of_keyword_arguments_gets_those_of_the_section_only() -> None:
    assert parameter_count(section("anything", hidden=2), SHAPE) == 193 * 2 + 15


def test_a_factory_may_change_the_lists_it_gets() -> None:
    config = section("uses_up", widths=[7, 6, 5])
    counts = [parameter_count(config, SHAPE) for _ in range(2)]
    assert counts == [193 * 7 + 8 * 6 + 7 * 5] * 2
    assert config.arguments == {"widths": [7, 6, 5]}


def test_layers_that_take_their_size_from_the_first_images_are_ready_to_train() -> None:
    model = build(section("lazy", init="orthogonal"), SHAPE, seed=0)
    weight = model[1].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(5), atol=1e-5, rtol=0)


def test_a_model_that_reads_values_is_counted_on_the_cpu() -> None:
    assert parameter_count(section("ReadsValues"), SHAPE) == 1 + 193 * 5


def test_a_seed_decides_the_weights() -> None:
    first, again, other = (build(section("ByParts"), SHAPE, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.network[1].weight, again.network[1].weight)
    assert not torch.equal(first.network[1].weight, other.network[1].weight)


def test_a_seed_decides_what_numpy_and_python_draw_and_leaves_their_generators_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    first, again, other = (build(section("drawn_otherwise"), SHAPE, seed=s) for s in (1, 1, 2))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    for mine, another in zip(first.parameters(), other.parameters(), strict=True):
        assert not torch.equal(mine, another)


def test_a_model_is_tried_in_training_mode_too() -> None:
    with pytest.raises(UsageError, match=r"logits \[2, 5\] in training mode too, .* gave tuple"):
        build(section("Auxiliary", broken=True), SHAPE, seed=0)


def test_a_model_that_was_tried_is_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    parameter_count(section("Auxiliary"), SHAPE)
    model = build(section("Auxiliary"), SHAPE, seed=0)
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert model.calls == 1
    assert model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("old", [False, True])
def test_weights_that_are_computed_cannot_be_drawn_anew(old: bool) -> None:
    assert build(section("normalized", old=old), SHAPE)
    for count in (parameter_count, build):
        with pytest.raises(UsageError, match=r"must be default .* layer '1' are, but got init="):
            count(section("normalized", old=old, init="orthogonal"), SHAPE)


def test_a_check_builds_nothing() -> None:
    assert check_custom(section("breaks")).__name__ == "breaks"


@pytest.mark.parametrize("check", [check_custom, lambda config: build(config, SHAPE)])
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("my_modles:linear", {}, "there is none named 'my_modles'; .*PYTHONPATH"),
        ("my_models.sub:linear", {}, "there is none named 'my_models.sub'"),
        ("my_broken_models:linear", {}, "needs the module 'no_such_package_anywhere'"),
        ("my_failing_models:linear", {}, "raised ZeroDivisionError: division by zero"),
        ("my_models:liner", {}, "has no 'liner'; did you mean 'linear'"),
        ("my_models:constant", {}, "must be callable, but it is a int"),
        ("my_models:linear", {}, "needs 'depth', but the section does not give it"),
        ("my_models:ByParts", {"hiden": 3}, "no argument 'hiden'; did you mean 'hidden'"),
        (
            "my_models:linear",
            {"dept": 1},
            "argument 'dept'; did you mean 'depth'.*needs 'depth'",
        ),
        ("my_models:by_position", {"second": 1}, "'first' must have a name"),
    ],
)
def test_wrong_names_and_arguments_are_explained(
    check: Callable[[Custom], object], name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check(Custom(name=name, **arguments))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_module", "must return a torch.nn.Module, but it returned list"),
        ("wrong_classes", r"images \[2, 3, 8, 8\] to logits \[2, 5\], but it gave \[2, 4\]"),
        ("wrong_input", r"logits \[2, 5\], but raised RuntimeError"),
        ("several_outputs", r"logits \[2, 5\], but (it gave tuple|raised)"),
        ("breaks", "it raised RuntimeError: no such thing"),
        ("Remembers", "must hold tensors only, but '_extra_state' is a dict; let get_extra_state"),
    ],
)
def test_a_factory_that_gives_no_fitting_model_is_explained(factory: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(section(factory), SHAPE)

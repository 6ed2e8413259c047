"""The parts of a cohort by themselves: which trials fit, random streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sweeper.config import DataShape, TrialConfig
from sweeper.models import build
from sweeper.training.cohort import structure, why_alone, why_not_beside
from sweeper.training.cohort.noise import Noise, rates_of
from sweeper.training.precision import precision_of

CPU = torch.device("cpu")
MakeConfig = Callable[..., TrialConfig]

ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "svm": ({"model": {"name": "svm"}}, "model svm is none of cnn, mixer, mlp, vit"),
    "resnet18": ({"model": {"name": "resnet18"}}, "model resnet18"),
    "timm": ({"model": {"name": "timm", "architecture": "x"}}, "model timm"),
    "custom": ({"model": {"name": "my.models:make"}}, "model my.models:make"),
    "rmsprop": ({"optimizer": {"name": "rmsprop"}}, "optimizer rmsprop is none of adam, adamw"),
    "adadelta": ({"optimizer": {"name": "adadelta"}}, "optimizer adadelta"),
    "float16": ({"precision": "float16"}, "loss scaling for float16"),
    "statistics": ({"layer_statistics": True}, "layer statistics"),
    "graph": ({"graph": "on"}, "train.graph: on needs a CUDA device"),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_cannot_join_says_why(case: str, make_config: MakeConfig) -> None:
    sections, reason = ALONE[case]
    assert reason in (why_alone(make_config(**sections), CPU) or "")


@pytest.mark.parametrize("case", ALONE)
def test_what_fits_into_no_cohort_can_train_beside_others_unless_it_is_compiled(
    case: str, make_config: MakeConfig
) -> None:
    sections = ALONE[case][0]
    assert bool(why_not_beside(make_config(**sections), CPU)) == (case == "svm")
    compiled = why_not_beside(make_config(**{**sections, "compile": "on"}), CPU)
    assert compiled is not None
    assert ("no cohort to compile for" in compiled) == (case != "svm")


@pytest.mark.parametrize("model", ["mlp", "mixer", "cnn", "vit"])
def test_the_usual_can_join(model: str, make_config: MakeConfig) -> None:
    section = {"name": model} | ({} if model in {"mlp", "cnn"} else {"patch": 4})
    assert why_alone(make_config(section), CPU) is None


def test_structure_tells_shapes_apart_and_nothing_else(make_config: MakeConfig) -> None:
    plain = make_config()
    same = [
        make_config({"name": "mlp", "width": 16, "layers": 1, "dropout": 0.5, "init": "sparse"}),
        make_config(optimizer={"name": "sgd", "lr": 0.5, "schedule": "cosine", "clip_norm": 1.0}),
        make_config(seed=5, epochs=9, label_smoothing=0.1),
    ]
    other = [
        make_config({"name": "mlp", "width": 17, "layers": 1}),
        make_config({"name": "mlp", "width": 16, "layers": 1, "norm": "layer"}),
        make_config(data={"augment": ["flip"]}),
        make_config(batch_size=33),
        make_config(loss="mse"),
        make_config(precision="float64"),
    ]
    assert {structure(config) for config in same} == {structure(plain)}
    assert len({structure(config) for config in [plain, *other]}) == len(other) + 1


@pytest.mark.parametrize("model", ["mlp", "mixer", "cnn", "vit"])
def test_masks_are_what_dropout_draws(model: str, make_config: MakeConfig) -> None:
    """Layer by layer the very numbers, for members of different rates and seeds."""
    shape = DataShape(3, 8, 8, 4)
    section: dict[str, Any] = {"name": model}
    section |= {"patch": 4, "embed_dim": 8} if model in {"mixer", "vit"} else {}
    config = make_config(section, precision="float64")
    rates = (0.0, 0.25, 0.5)
    models = [
        build(config.model.model_copy(update={"dropout": rate}), shape, seed=0).double().train()
        for rate in rates
    ]
    noise = Noise(models[0], precision=precision_of(config.train, CPU), device=CPU)
    noise.configure([rates_of(each) for each in models])
    noise.prepare(6, shape)
    noise.seed([11, 12, 13])
    drawn = noise.masks(6)
    assert len(drawn) == len(rates_of(models[0]))
    images = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    for k, each in enumerate(models):
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, found: dict[str, torch.Tensor] = found) -> Any:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
                found[name] = torch.where(inputs[0] == 0, 0.0, output / inputs[0])

            return hook

        for name, layer in each.named_modules():
            if isinstance(layer, nn.Dropout):
                layer.register_forward_hook(keep(name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11 + k)
            each(images)
        for name, mask in found.items():
            expected = drawn[f"{name}.mask"][k]
            known = mask != 0
            torch.testing.assert_close(mask[known], expected[known])
        shares = [(drawn[f"{name}.mask"][k] == 0).double().mean().item() for name in found]
        assert all((share > 0) == (rates[k] > 0) for share in shares)

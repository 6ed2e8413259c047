"""What every registered model keeps, whatever its family and variant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from sweeper.config import DataShape, ModelConfig
from sweeper.errors import UsageError
from sweeper.models import MODELS, build, parameter_count

CONFIG: TypeAdapter[Any] = TypeAdapter(ModelConfig)

SHAPES = {
    "digits": DataShape(1, 8, 8, 10),
    "mnist": DataShape(1, 28, 28, 10),
    "cifar10": DataShape(3, 32, 32, 10),
    "oblong": DataShape(2, 12, 20, 7),
}
MODEL_SECTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "width": 32},
    "mlp-batch": {"name": "mlp", "width": 32, "norm": "batch", "activation": "tanh"},
    "mlp-layer": {"name": "mlp", "width": 32, "norm": "layer", "activation": "sigmoid"},
    "mlp-linear": {"name": "mlp", "layers": 0},
    "mixer": {"name": "mixer", "embed_dim": 16, "blocks": 2},
    "mixer-r0": {
        "name": "mixer",
        "embed_dim": 8,
        "blocks": 3,
        "token_hidden": "4N",
        "channel_hidden": "4C",
        "skip": False,
        "init": "xavier_uniform",
    },
    "mixer-r2": {
        "name": "mixer",
        "embed_dim": 16,
        "blocks": 2,
        "token_hidden": 512,
        "channel_hidden": 512,
        "activation": "relu",
        "dropout_at": "hidden",
        "norm": "none",
        "stem_norm": "batch",
        "final_norm": "none",
    },
    "mixer-batch": {"name": "mixer", "embed_dim": 16, "blocks": 2, "norm": "batch"},
    "cnn": {"name": "cnn", "channels": [4, 8], "hidden": 16},
    "cnn-batch": {
        "name": "cnn",
        "channels": [4, 8, 8],
        "hidden": 16,
        "batch_norm": True,
        "ceil_mode": True,
    },
    "resnet18": {"name": "resnet18"},
    "resnet18-imagenet": {"name": "resnet18", "stem": "imagenet"},
    "vit": {"name": "vit", "patch": 4, "embed_dim": 16, "blocks": 2},
    "vit-learned": {"name": "vit", "patch": 2, "embed_dim": 16, "blocks": 1, "position": "learned"},
    "vit-none": {"name": "vit", "patch": 4, "embed_dim": 16, "blocks": 1, "position": "none"},
    "timm-vit": {"name": "timm", "architecture": "test_vit", "image_size": 32},
    "timm-efficientnet": {"name": "timm", "architecture": "test_efficientnet"},
}
VMAPPED = [
    name for name in MODEL_SECTIONS if not name.startswith("timm") and name != "resnet18-imagenet"
]

every_model = pytest.mark.parametrize("name", MODEL_SECTIONS)
every_shape = pytest.mark.parametrize("data", SHAPES)


def config_of(name: str, **changes: Any) -> ModelConfig:
    return CONFIG.validate_python(MODEL_SECTIONS[name] | changes)


def images_for(shape: DataShape, batch: int = 4, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, *shape[:3], generator=generator, **kwargs)


def test_every_registered_model_is_tested_here() -> None:
    assert {section["name"] for section in MODEL_SECTIONS.values()} == set(MODELS)


@every_model
@every_shape
def test_images_become_finite_logits_and_leave_a_gradient_everywhere(name: str, data: str) -> None:
    shape = SHAPES[data]
    model = build(config_of(name), shape, seed=0)
    x_BCHW = images_for(shape)
    logits = model(x_BCHW)
    assert logits.shape == (4, shape.classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert x_BCHW._version == 0, "the model wrote into its input"
    nn.functional.cross_entropy(logits, torch.arange(4) % shape.classes).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        if parameter.dim() > 1:  # a bias before batch normalisation has none, by definition
            assert parameter.grad.abs().sum() > 0, path


@every_model
def test_a_seed_decides_the_weights_and_leaves_the_callers_generator_alone(name: str) -> None:
    shape = SHAPES["digits"]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build(config_of(name), shape, seed=1)
    second = build(config_of(name), shape, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    again = build(config_of(name), shape, seed=1)
    for path, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[path]), path
    assert any(
        not torch.equal(mine, other)
        for mine, other in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_without_a_seed_the_callers_generator_decides() -> None:
    def weights() -> Tensor:
        return next(build(config_of("mlp"), SHAPES["digits"]).parameters())

    torch.manual_seed(5)
    first, second = weights(), weights()
    torch.manual_seed(5)
    assert torch.equal(weights(), first)
    assert not torch.equal(first, second)


@every_model
@every_shape
def test_on_the_meta_device_there_are_shapes_without_numbers(name: str, data: str) -> None:
    """Also shows that nothing in the model reads values on the host, as a graph requires."""
    shape = SHAPES[data]
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = build(config_of(name), shape, seed=0)
        logits = model(torch.zeros(4, *shape[:3]))
    assert logits.is_meta
    assert logits.shape == (4, shape.classes)
    assert all(value.is_meta for value in model.state_dict().values())
    assert torch.equal(torch.get_rng_state(), before)


@every_model
def test_the_parameter_count_is_that_of_the_built_model(name: str) -> None:
    config, shape = config_of(name), SHAPES["mnist"]
    built = sum(parameter.numel() for parameter in build(config, shape, seed=0).parameters())
    assert parameter_count(config, shape) == built


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention, on a CPU
@pytest.mark.parametrize("name", VMAPPED)
def test_stacked_members_under_vmap_equal_each_member_alone(name: str) -> None:
    """Logits, gradients and running statistics, in float64 and in training mode."""
    shape, labels = SHAPES["digits"], torch.arange(3)
    members = [build(config_of(name), shape, seed=seed).double() for seed in range(2)]
    alone = [copy.deepcopy(member) for member in members]
    x_BCHW = images_for(shape, batch=3, dtype=torch.float64)
    skeleton = copy.deepcopy(members[0]).to("meta")
    parameters, buffers = stack_module_state(members)

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(skeleton, (parameters, buffers), (x_BCHW,))
        return logits

    logits_KBC = vmap(forward)(parameters, buffers)
    sum(nn.functional.cross_entropy(logits, labels) for logits in logits_KBC).backward()

    for index, member in enumerate(alone):
        logits = member(x_BCHW)
        nn.functional.cross_entropy(logits, labels).backward()
        torch.testing.assert_close(logits_KBC[index], logits)
        for path, parameter in member.named_parameters():
            gradient = parameters[path].grad
            assert gradient is not None, path
            torch.testing.assert_close(gradient[index], parameter.grad, msg=path)
        for path, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[path][index], buffer, msg=path)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention, on a CPU
@pytest.mark.parametrize("name", ["mlp", "mixer", "cnn", "vit"])
def test_dropout_acts_in_training_only_and_differs_between_members(name: str) -> None:
    shape = SHAPES["digits"]
    model = build(config_of(name, dropout=0.5), shape, seed=0)
    x_BCHW = images_for(shape)
    assert not torch.equal(model(x_BCHW), model(x_BCHW))
    members = [copy.deepcopy(model) for _ in range(2)]
    parameters, buffers = stack_module_state(members)
    logits_KBC = vmap(
        lambda p, b: functional_call(model, (p, b), (x_BCHW,)), randomness="different"
    )(parameters, buffers)
    assert not torch.equal(logits_KBC[0], logits_KBC[1])
    model.eval()
    assert torch.equal(model(x_BCHW), model(x_BCHW))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "mixer", "patch": 5}, "patch must divide the 28x28 image"),
        ({"name": "vit", "patch": 7, "heads": 5}, "heads must divide embed_dim"),
        ({"name": "svm"}, "SvmModel"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(CONFIG.validate_python(section), SHAPES["mnist"])


def test_a_support_vector_machine_has_no_parameters_to_train() -> None:
    assert parameter_count(CONFIG.validate_python({"name": "svm"}), SHAPES["mnist"]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_model
def test_on_a_gpu_the_weights_are_those_of_the_cpu_and_the_step_can_be_captured(name: str) -> None:
    shape = SHAPES["cifar10"]
    on_cpu = build(config_of(name), shape, seed=3)
    x_BCHW, labels = images_for(shape).cuda(), torch.arange(4).cuda()
    with torch.device("cuda"):
        model = build(config_of(name), shape, seed=3)
    for path, value in on_cpu.state_dict().items():
        assert torch.equal(value, model.state_dict()[path].cpu()), path

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x_BCHW), labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = nn.functional.cross_entropy(model(x_BCHW), labels)
        loss.backward()
    graph.replay()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())

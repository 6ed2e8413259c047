"""What the reports say of each family: sizes, order of layers, variants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sweeper.config import DataShape, ModelConfig
from sweeper.models import build, parameter_count, sinusoidal_encoding
from sweeper.models.layers import PatchEmbedding, TokenBatchNorm, TwoLayerMlp
from sweeper.models.mixer import TokenMlp
from sweeper.models.vit import Attention

CONFIG: TypeAdapter[Any] = TypeAdapter(ModelConfig)
CIFAR10 = DataShape(3, 32, 32, 10)
MNIST = DataShape(1, 28, 28, 10)


def built(shape: DataShape, **section: Any) -> nn.Module:
    return build(CONFIG.validate_python(section), shape, seed=0)


def size(shape: DataShape, **section: Any) -> int:
    return parameter_count(CONFIG.validate_python(section), shape)


# --- mixer


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize(("width", "blocks"), [(256, 4), (64, 2), (300, 6)])
def test_the_mixer_has_the_parameters_of_r44(patch: int, width: int, blocks: int) -> None:
    p, c = patch, width
    patches = (32 // p) ** 2
    block = patches * (c + 1) + 8 * c * c + 19 * c // 2
    expected = 3 * c * p * p + c + blocks * block + 2 * c + 10 * c + 10
    assert size(CIFAR10, name="mixer", patch=p, embed_dim=c, blocks=blocks) == expected


@pytest.mark.parametrize(("patch", "expected"), [(4, 2_188_298), (8, 2_175_818), (16, 2_310_938)])
def test_the_default_mixer_has_the_published_size(patch: int, expected: int) -> None:
    assert 768 * patch**2 + 4 * (263168 // patch**2 + 526720) + 3338 == expected
    assert size(CIFAR10, name="mixer", patch=patch) == expected


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        # R0: stem 17 x 8; 12 x (2 norms, 49-196-49, 8-32-8); norm; head
        (
            {"embed_dim": 8, "blocks": 12, "token_hidden": "4N", "skip": False},
            136 + 12 * (32 + 19453 + 552) + 16 + 90,
        ),
        # R2: stem 17 x 16, its norm; 2 x (49-512-49, 16-512-16); head
        (
            {
                "embed_dim": 16,
                "blocks": 2,
                "token_hidden": 512,
                "channel_hidden": 512,
                "activation": "relu",
                "dropout": 0.5,
                "dropout_at": "hidden",
                "norm": "none",
                "stem_norm": "batch",
                "final_norm": "none",
            },
            272 + 32 + 2 * (50737 + 16912) + 170,
        ),
        # R3: stem 17 x 16; 8 x (2 norms, 49-1024-49, 16-512-16); norm; head
        (
            {"embed_dim": 16, "blocks": 8, "token_hidden": 1024, "channel_hidden": 512},
            272 + 8 * (64 + 101425 + 16912) + 32 + 170,
        ),
    ],
    ids=["R0", "R2", "R3"],
)
def test_the_mixers_of_the_other_reports_have_their_sizes(
    section: dict[str, Any], expected: int
) -> None:
    assert size(MNIST, name="mixer", **section) == expected


def test_patches_are_embedded_as_by_a_convolution_with_that_stride() -> None:
    embedding = PatchEmbedding(3, 4, 16)
    x_BCHW = torch.randn(2, 3, 8, 12)
    weight = embedding.projection.weight.view(16, 3, 4, 4)
    convolved = nn.functional.conv2d(x_BCHW, weight, embedding.projection.bias, stride=4)
    torch.testing.assert_close(embedding(x_BCHW), convolved.flatten(2).transpose(1, 2))


def test_without_skip_a_block_forgets_its_input() -> None:
    """With the last layer of both MLPs at zero, a residual block is the identity."""
    x_BNC = torch.randn(2, 49, 8)
    for skip in (True, False):
        block = built(MNIST, name="mixer", embed_dim=8, blocks=1, skip=skip).blocks[0]
        for mlp in (block.token_mlp, block.channel_mlp):
            nn.init.zeros_(mlp.down.weight)
            nn.init.zeros_(mlp.down.bias)
        assert torch.equal(block(x_BNC), x_BNC if skip else torch.zeros_like(x_BNC))


def test_the_token_mlp_mixes_patches_and_the_channel_mlp_features() -> None:
    block = built(MNIST, name="mixer", embed_dim=8, blocks=1, norm="none").blocks[0]
    assert block.token_mlp.up.weight.shape == (4, 49)
    assert block.channel_mlp.up.weight.shape == (32, 8)
    x_BNC = torch.randn(1, 49, 8)
    changed = x_BNC.clone()
    changed[0, 5] += 1.0
    nn.init.zeros_(block.token_mlp.down.weight)
    moved = (block(changed) - block(x_BNC)).abs().sum(dim=2)[0]
    assert moved.nonzero().flatten().tolist() == [5], "only the token MLP may mix patches"


@pytest.mark.parametrize("hidden", [3, 20])
def test_patches_are_mixed_the_same_by_a_product_an_image(hidden: int) -> None:
    torch.manual_seed(0)
    rows = TokenMlp(9, hidden, features=16, activation="gelu", dropout=0.0).double()
    x_BNC = torch.randn(5, 9, 16, dtype=torch.float64, requires_grad=True)
    found, wanted = rows.by_image(x_BNC), rows(x_BNC)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous()
    towards, leaves = torch.randn_like(wanted), [x_BNC, *rows.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, towards), torch.autograd.grad(wanted, leaves, towards)
    )


def test_autocast_casts_a_weight_once_and_not_for_every_image() -> None:
    mlp, cast = TokenMlp(16, 8, features=16, activation="gelu", dropout=0.0), list[int]()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, _: Any, given: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten._to_copy.default:
                cast.append(given[0].untyped_storage().nbytes() // 4)
            found = op(*given, **(kwargs or {}))
            if op is torch.ops.aten._to_copy.default:
                assert found.untyped_storage().nbytes() // 2 in {16 * 8, 16, 8, 5 * 16 * 16}
            return found

    with torch.autocast("cpu", dtype=torch.bfloat16), Casts():
        assert mlp.by_image(torch.randn(5, 16, 16)).dtype is torch.bfloat16
    assert cast.count(16 * 8) == 2


@pytest.mark.parametrize(
    ("patches", "features", "dropout", "expected"),
    [(64, 256, 0.0, True), (16, 16, 0.0, True), (49, 16, 0.0, False), (4, 256, 0.1, False)],
)
def test_few_patches_of_which_nothing_is_dropped_are_mixed_by_image(
    patches: int, features: int, dropout: float, expected: bool
) -> None:
    """On a GPU. Masks are drawn for rows: what is dropped is the same in every way to train."""
    mlp = TokenMlp(patches, 8, features=features, activation="gelu", dropout=dropout)
    assert mlp.each_image is expected


@pytest.mark.parametrize(("where", "dropouts"), [("both", 2), ("hidden", 1)])
def test_dropout_follows_both_linear_layers_or_stands_between_them(
    where: Any, dropouts: int
) -> None:
    mlp = TwoLayerMlp(4, 8, activation="relu", dropout=0.25, dropout_at=where)
    assert [m.p for m in mlp.modules() if isinstance(m, nn.Dropout)] == [0.25] * dropouts
    nn.init.zeros_(mlp.down.weight)
    nn.init.ones_(mlp.down.bias)
    dropped = (mlp(torch.randn(100, 4)) == 0).any()
    assert dropped == (where == "both")


def test_batch_norm_of_tokens_normalises_each_feature_over_images_and_patches() -> None:
    norm, x_BNC = TokenBatchNorm(8), torch.randn(4, 49, 8) * 3 + 2
    y_BNC = norm(x_BNC)
    torch.testing.assert_close(
        y_BNC, nn.BatchNorm1d(8)(x_BNC.transpose(1, 2)).transpose(1, 2), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(y_BNC.mean(dim=(0, 1)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * x_BNC.mean(dim=(0, 1)))


# --- cnn


def test_the_cnn_has_the_weights_of_r1b() -> None:
    model = built(CIFAR10, name="cnn")
    weights = [p.numel() for p in model.parameters() if p.dim() > 1]
    assert weights == [2_400, 51_200, 102_400, 1_024_000, 10_000]
    assert sum(weights) == 1_190_000
    biases = [p.numel() for p in model.parameters() if p.dim() == 1]
    assert biases == [32, 64, 64, 1000, 10]


def test_the_cnn_normalises_every_convolution_before_its_activation() -> None:
    model = built(CIFAR10, name="cnn", batch_norm=True, dropout=0.5)
    for stage in model.stages:
        kinds = [type(layer) for layer in stage]
        assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert model.dropout.p == 0.5


def test_ceil_mode_rounds_up_in_the_last_pooling_only() -> None:
    """28 becomes 14, 7, then 3 or 4."""
    floor, ceil = (built(MNIST, name="cnn", ceil_mode=mode) for mode in (False, True))
    assert floor.hidden.in_features == 64 * 3 * 3
    assert ceil.hidden.in_features == 64 * 4 * 4
    assert ceil(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


# --- resnet


@pytest.mark.parametrize("channels", [1, 3])
def test_the_stem_of_resnet18_fits_small_images(channels: int) -> None:
    shape = DataShape(channels, 32, 32, 10)
    cifar = built(shape, name="resnet18")
    assert cifar.conv1.weight.shape == (64, channels, 3, 3)
    assert cifar.conv1.stride == (1, 1)
    assert isinstance(cifar.maxpool, nn.Identity)
    imagenet = built(shape, name="resnet18", stem="imagenet")
    assert imagenet.conv1.weight.shape == (64, channels, 7, 7)
    assert imagenet.conv1.stride == (2, 2)


def test_resnet18_has_its_known_size() -> None:
    """11,689,512 with a thousand classes, as torchvision publishes."""
    thousand = DataShape(3, 224, 224, 1000)
    assert size(thousand, name="resnet18", stem="imagenet") == 11_689_512
    assert size(CIFAR10, name="resnet18") == 11_173_962


# --- vit


def test_the_position_encoding_is_sines_and_cosines() -> None:
    encoding = sinusoidal_encoding(100, 16)
    assert encoding.shape == (100, 16)
    assert encoding.dtype == torch.float32
    assert encoding[0].tolist() == [0.0, 1.0] * 8
    for position, column in ((1, 0), (7, 4), (99, 14)):
        angle = position / 10000 ** (column / 16)
        assert encoding[position, column].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert encoding[position, column + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sinusoidal_encoding(1000, 160).shape == (1000, 160)
    assert sinusoidal_encoding(5, 3).shape == (5, 3)


def test_attention_equals_torchs_own() -> None:
    own = Attention(16, heads=4, dropout=0.0)
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(own.qkv.weight)
        reference.in_proj_bias.copy_(own.qkv.bias)
        reference.out_proj.weight.copy_(own.projection.weight)
        reference.out_proj.bias.copy_(own.projection.bias)
    x_BTC = torch.randn(2, 5, 16)
    torch.testing.assert_close(own(x_BTC), reference(x_BTC, x_BTC, x_BTC)[0])


def test_the_vit_has_the_size_of_its_parts() -> None:
    """R1c at its best: patch 14 of 28x28, width 32, 6 blocks."""
    c = 32
    block = 2 * 2 * c + (3 * c * c + 3 * c) + (c * c + c) + (8 * c * c + 5 * c)
    fixed = (196 * c + c) + c + 6 * block + 2 * c + (10 * c + 10)
    assert size(MNIST, name="vit") == fixed
    assert size(MNIST, name="vit", position="learned") == fixed + 5 * c
    assert size(MNIST, name="vit", position="none") == fixed


@pytest.mark.parametrize("patch", [2, 4, 7, 14, 28])
def test_every_patch_of_r1c_fits_mnist(patch: int) -> None:
    model = built(MNIST, name="vit", patch=patch, blocks=1)
    assert model.position.shape == ((28 // patch) ** 2 + 1, 32)
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_positions_tell_patches_apart() -> None:
    """Without them the order of the patches is lost on the class token."""
    x_BCHW = torch.randn(1, 1, 28, 28)
    swapped = torch.cat((x_BCHW[..., 14:], x_BCHW[..., :14]), dim=-1)

    def difference(position: str) -> float:
        model = built(MNIST, name="vit", position=position)
        return (model(x_BCHW) - model(swapped)).abs().max().item()

    assert difference("none") < 1e-5
    assert difference("sinusoidal") > 1e-4
    assert difference("learned") > 1e-4


# --- initialisation


def weight_of(init: str) -> Tensor:
    """The largest linear weight, [1000, 1024], after checking that every bias is zero."""
    model = built(CIFAR10, name="cnn", init=init)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(not layer.bias.any() for layer in layers)
    return model.hidden.weight.detach()


@pytest.mark.parametrize(
    ("init", "std"),
    [
        ("xavier_uniform", math.sqrt(2 / 2024)),
        ("xavier_normal", math.sqrt(2 / 2024)),
        ("kaiming_uniform", math.sqrt(2 / 1024)),
        ("kaiming_normal", math.sqrt(2 / 1024)),
        ("trunc_normal", 0.02),
        ("orthogonal", math.sqrt(1 / 1024)),
        ("sparse", 0.01 * math.sqrt(0.9)),
    ],
)
def test_each_initialisation_has_its_spread_and_no_bias(init: str, std: float) -> None:
    weight = weight_of(init)
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert weight.mean().item() == pytest.approx(0.0, abs=std / 100)


def test_orthogonal_rows_are_orthonormal_and_sparse_columns_a_tenth_zero() -> None:
    weight = weight_of("orthogonal")
    torch.testing.assert_close(weight @ weight.T, torch.eye(1000), atol=1e-4, rtol=0)
    assert ((weight_of("sparse") == 0).sum(dim=0) == 100).all()


def test_convolutions_are_initialised_too_and_norms_left_alone() -> None:
    model = built(CIFAR10, name="cnn", init="sparse", batch_norm=True)
    convolution, norm = model.stages[1][0], model.stages[1][1]
    zeros_per_input = (convolution.weight.flatten(1) == 0).sum(dim=0)
    assert (zeros_per_input == math.ceil(0.1 * 64)).all()
    assert (norm.weight == 1).all()


def test_the_default_initialisation_is_torchs() -> None:
    torch.manual_seed(0)
    reference = nn.Linear(1024, 512)
    model = built(DataShape(1, 32, 32, 10), name="mlp")
    assert torch.equal(model.layers[0].weight, reference.weight)
    assert torch.equal(model.layers[0].bias, reference.bias)

"""The ``model`` section: one class a family, chosen by ``name``.

A ``name`` with a colon, ``package.module:factory``, is a model of your own: the factory is called
with the keyword arguments of the section and the shape of the data.
Letters as in the reports: C embedding width, N patches.
"""

from __future__ import annotations

import copy
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, StringConstraints, Tag

from sweeper.config.base import Section
from sweeper.config.data import DataShape

Activation = Literal["relu", "gelu", "tanh", "sigmoid", "silu"]
Init = Literal[
    "default",
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "trunc_normal",
    "orthogonal",
    "sparse",
]
Hidden = (
    Annotated[int, Field(ge=1)]
    | Annotated[str, StringConstraints(pattern=r"^(\d+(\.\d+)?|\.\d+)[CN]$")]
)
"""A hidden width: a number of units, or a multiple of C (embedding) or N (patches): ``0.5C``."""


def hidden_width(hidden: int | str, *, embed_dim: int, patches: int) -> int:
    """Resolve ``hidden`` to a number of units, at least 1.

    >>> hidden_width("0.5C", embed_dim=256, patches=64)
    128
    """
    if isinstance(hidden, int):
        return hidden
    factor, unit = float(hidden[:-1]), hidden[-1]
    return max(1, int(factor * (embed_dim if unit == "C" else patches)))


def _check_patch(patch: int, shape: DataShape) -> None:
    if shape.height % patch or shape.width % patch:
        divisors = [
            side
            for side in range(1, min(shape.height, shape.width) + 1)
            if not shape.height % side and not shape.width % side
        ]
        raise ValueError(
            f"patch must divide the {shape.height}x{shape.width} image, but got patch={patch}; "
            f"it can be one of {', '.join(map(str, divisors))}"
        )


class _Model(Section):
    """``init`` draws linear and convolutional weights anew; ``default`` leaves torch's."""

    init: Init = "default"

    def check(self, shape: DataShape) -> None:
        """Raise ValueError where the model cannot take images of ``shape``."""

    def needs_batches(self, shape: DataShape) -> bool:
        """Whether batch normalization would get a single number a channel of one image."""
        return False


class Mlp(_Model):
    """Flatten, ``layers`` times (linear, norm, activation, dropout), linear.

    ``width`` is the number of units of each hidden layer. ``activation`` is the non-linearity.
    ``norm`` stands between linear layer and activation. ``dropout`` is the share of units dropped.
    """

    name: Literal["mlp"]
    width: int = Field(default=512, ge=1)
    layers: int = Field(default=2, ge=0)
    activation: Activation = "relu"
    norm: Literal["none", "batch", "layer"] = "none"
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def needs_batches(self, shape: DataShape) -> bool:
        return self.norm == "batch" and self.layers > 0


class Mixer(_Model):
    """MLP-Mixer with the knobs of all five reports; the defaults are R4.4's.

    ``patch`` is the side of a square patch in pixels. ``embed_dim`` is C, the width of a patch's
    embedding. ``blocks`` counts pairs of token and channel MLP. ``token_hidden`` and
    ``channel_hidden`` are the hidden widths of the two, in units or as a multiple of C or N, the
    number of patches. ``activation`` is the non-linearity of the MLPs. ``dropout`` is the share of
    units dropped. ``skip`` adds the input of an MLP to its output.
    ``dropout_at``: after ``both`` linear layers of an MLP (R0), or after its activation only
    (``hidden``, R2). ``norm`` stands before each MLP, ``stem_norm`` after the patch embedding
    (R2: batch), ``final_norm`` before the mean over patches.
    """

    name: Literal["mixer"]
    patch: int = Field(default=4, ge=1)
    embed_dim: int = Field(default=256, ge=1)
    blocks: int = Field(default=4, ge=1)
    token_hidden: Hidden = "0.5C"
    channel_hidden: Hidden = "4C"
    activation: Activation = "gelu"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    dropout_at: Literal["both", "hidden"] = "both"
    skip: bool = True
    norm: Literal["none", "batch", "layer"] = "layer"
    stem_norm: Literal["none", "batch", "layer"] = "none"
    final_norm: Literal["none", "batch", "layer"] = "layer"

    def check(self, shape: DataShape) -> None:
        _check_patch(self.patch, shape)

    def needs_batches(self, shape: DataShape) -> bool:
        one_patch = shape.height == shape.width == self.patch
        return one_patch and "batch" in {self.norm, self.stem_norm, self.final_norm}


class Cnn(_Model):
    """Report R1b: three 5x5 convolutions with max-pooling, two linear layers.

    ``channels`` are the channels of the convolutions, and how many there are. ``kernel`` is the
    side of their kernels in pixels, odd. ``hidden`` is the width between the linear layers.
    ``activation`` is the non-linearity. ``batch_norm`` normalizes after every convolution.
    ``dropout`` is the share of units dropped between the linear layers. ``ceil_mode`` rounds the
    side up where the last pooling halves an odd one.
    """

    name: Literal["cnn"]
    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(32, 64, 64), min_length=1, strict=False
    )
    kernel: int = Field(default=5, ge=1)
    hidden: int = Field(default=1000, ge=1)
    activation: Activation = "relu"
    batch_norm: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    ceil_mode: bool = False

    def check(self, shape: DataShape) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, but got kernel={self.kernel}")
        if min(shape.height, shape.width) < 2 ** len(self.channels):
            raise ValueError(
                f"channels must have at most {min(shape.height, shape.width).bit_length() - 1} "
                f"entries for a {shape.height}x{shape.width} image, because each halves it, "
                f"but got {len(self.channels)}"
            )


class Resnet18(_Model):
    """torchvision's ResNet-18.

    ``stem``: ``cifar`` is 3x3 with stride 1 and no max-pooling, ``imagenet`` torchvision's own.
    """

    name: Literal["resnet18"]
    stem: Literal["cifar", "imagenet"] = "cifar"

    def needs_batches(self, shape: DataShape) -> bool:
        shrinks_by = 8 if self.stem == "cifar" else 32
        return max(shape.height, shape.width) <= shrinks_by


class Vit(_Model):
    """Report R1c: class token, position encoding, pre-norm blocks, class token to linear.

    ``patch`` is the side of a square patch in pixels. ``embed_dim`` is C, the width of a token.
    ``blocks`` counts pairs of attention and MLP. ``heads`` of the attention must divide embed_dim.
    ``hidden`` is the hidden width of the MLPs, in units or as a multiple of C or N, the number of
    patches. ``activation`` is the non-linearity of the MLPs. ``position`` is the encoding added to
    the tokens. ``dropout`` is the share of units dropped.
    """

    name: Literal["vit"]
    patch: int = Field(default=14, ge=1)
    embed_dim: int = Field(default=32, ge=1)
    blocks: int = Field(default=6, ge=1)
    heads: int = Field(default=2, ge=1)
    hidden: Hidden = "4C"
    activation: Activation = "gelu"
    position: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def check(self, shape: DataShape) -> None:
        _check_patch(self.patch, shape)
        if self.embed_dim % self.heads:
            raise ValueError(
                f"heads must divide embed_dim, but got heads={self.heads}, "
                f"embed_dim={self.embed_dim}"
            )


class Timm(_Model):
    """Any model of timm by name; channels, classes and input size are adapted to the data.

    ``architecture`` is timm's name of the model. ``pretrained`` starts from its published weights.
    ``image_size`` resizes the images on the device (None: as they are, where the model allows).
    """

    name: Literal["timm"]
    architecture: str = Field(min_length=1)
    pretrained: bool = False
    image_size: int | None = Field(default=None, ge=8)

    def check(self, shape: DataShape) -> None:
        if self.pretrained and self.init != "default":
            raise ValueError(
                "init must be default where pretrained is true, because it would overwrite the "
                f"pretrained weights, but got init={self.init}"
            )


class Svm(_Model):
    """Report R1a's baseline: scikit-learn's RBF support vector machine, one measurement.

    ``C`` is the inverse strength of its regularization. ``gamma`` is the width of its kernel.
    """

    name: Literal["svm"]
    C: float = Field(default=1.0, gt=0)
    gamma: Literal["scale", "auto"] | Annotated[float, Field(gt=0)] = "scale"


_FACTORY = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")


class Custom(_Model):
    """A model of your own: ``name: package.module:factory`` and the factory's keyword arguments."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, StringConstraints(pattern=_FACTORY.pattern)]

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for the factory: a copy, which it may change."""
        return copy.deepcopy(self.model_extra or {})


FAMILIES: tuple[type[_Model], ...] = (Mlp, Mixer, Cnn, Resnet18, Vit, Timm, Svm)


def _family(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if not isinstance(name, str):
        return None
    return "custom" if ":" in name else name


ModelConfig = Annotated[
    Annotated[Mlp, Tag("mlp")]
    | Annotated[Mixer, Tag("mixer")]
    | Annotated[Cnn, Tag("cnn")]
    | Annotated[Resnet18, Tag("resnet18")]
    | Annotated[Vit, Tag("vit")]
    | Annotated[Timm, Tag("timm")]
    | Annotated[Svm, Tag("svm")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(_family),
]

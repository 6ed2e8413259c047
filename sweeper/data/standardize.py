"""Standardisation with statistics of the training part: a module that is saved with the model.

Shapes: ``B`` batch, ``N`` images, ``C`` channels, ``H`` height, ``W`` width, ``D = C*H*W``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, Self

import torch
from torch import Tensor, nn

from sweeper.errors import UsageError

Kind = Literal["none", "channel", "zca"]

ZCA_EPSILON: Final = 0.01
"""Added to every eigenvalue, as a share of their mean."""

ZCA_IMAGES: Final = 10_000
"""The whitening matrix is estimated from that many images at most, evenly spread."""

ZCA_VALUES: Final = 8192
"""The largest D whose D x D matrix is still worth its memory and its cubic time."""

KEPT_BYTES: Final = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
"""Up to this many bytes, a part is kept standardized instead of standardizing every batch.

Measured with one thread of a CPU: a batch of 128 MNIST images is gathered and standardized in
0.2 ms, and gathered as floats in 0.04 ms. That is 8 % of a small MLP's step and nothing beside a
Mixer's 66 ms. The floats (162 MiB of MNIST's training part; CIFAR-10's would be 527 MiB) are mapped
by all workers of a machine, see `sweeper.data.shared`.
"""

_WHOLE_IMAGES: Final = 4096
"""So many images are standardized at once where a whole part is."""

_CHUNK_VALUES: Final = {"cpu": 1 << 15, "cuda": 1 << 24}
"""Values summed at once. On a CPU so few that torch does not share them out to threads: those wait
for each other after every chunk, which on busy cores took 10 to 30 s for 45,000 CIFAR images
instead of 0.4 s."""


class Standardize(nn.Module):
    """uint8 (0 to 255) or float (0 to 1) images ``[B, C, H, W]`` to float32 of the same shape.

    ``none`` brings uint8 to 0 to 1; ``channel`` subtracts each channel's mean and divides by its
    standard deviation (a constant channel becomes 0); ``zca`` subtracts the mean image and
    multiplies by a whitening matrix (report R1b). Points in the plane are floats and stay as they
    are under ``none``. After ``.double()`` the result is float64. Safe inside a CUDA graph.
    """

    shift: Tensor
    divisor: Tensor
    divisor_uint8: Tensor
    whitening: Tensor | None

    def __init__(self, *, mean: Tensor, std: Tensor, whitening_DD: Tensor | None = None) -> None:
        """``mean`` and ``std`` on the scale 0 to 1, in shapes that broadcast to ``[C, H, W]``."""
        super().__init__()
        std = torch.where(std > 1e-8, std, torch.ones_like(std))
        # x / std - mean / std is one fused addcdiv, and exact where mean is 0 and std 1.
        self.register_buffer("shift", (-mean / std).float())
        self.register_buffer("divisor", std.float())
        self.register_buffer("divisor_uint8", (255 * std).float())
        self.register_buffer("whitening", whitening_DD)

    @classmethod
    def fit(cls, images_NCHW: Tensor, kind: Kind, *, epsilon: float = ZCA_EPSILON) -> Self:
        """The standardisation that makes these images (the training part) mean 0, variance 1.

        The statistics of uint8 images are exact integers until the last division, hence equal on
        every device. ``zca`` computes the covariance of at most :data:`ZCA_IMAGES` images and its
        eigenvectors in float64, on the images' device: D = 3072 takes seconds on a CPU. Raises
        UsageError where D is above :data:`ZCA_VALUES`.
        """
        if kind == "zca":
            return cls._fit_zca(images_NCHW, epsilon)
        channels = images_NCHW.shape[1]
        mean_C, std_C = torch.zeros(channels), torch.ones(channels)
        if kind == "channel":
            mean_C, std_C = channel_statistics(images_NCHW)
        device = images_NCHW.device
        return cls(mean=mean_C.view(-1, 1, 1), std=std_C.view(-1, 1, 1)).to(device)

    @classmethod
    def _fit_zca(cls, images_NCHW: Tensor, epsilon: float) -> Self:
        count, values = len(images_NCHW), images_NCHW[0].numel()
        if values > ZCA_VALUES:
            raise UsageError(
                f"data.standardize: zca needs at most {ZCA_VALUES} values an image, but these "
                f"have {values} ({'x'.join(map(str, images_NCHW.shape[1:]))}); use channel"
            )
        chosen = torch.linspace(0, count - 1, min(count, ZCA_IMAGES), device=images_NCHW.device)
        sample = images_NCHW[chosen.round().long()]
        x_ND = sample.flatten(1).double() / (1 if sample.is_floating_point() else 255)
        mean_D = x_ND.mean(0)
        x_ND -= mean_D
        eigenvalues_D, vectors_DD = torch.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
        regularized_D = eigenvalues_D.clamp(min=0) + epsilon * eigenvalues_D.mean()
        scale_D = torch.where(regularized_D > 0, regularized_D, 1).rsqrt()
        return cls(
            mean=mean_D.view(sample.shape[1:]),
            std=torch.ones(1, 1, 1, device=mean_D.device),
            whitening_DD=((vectors_DD * scale_D) @ vectors_DD.T).float(),
        )

    @classmethod
    def restored(cls, buffers: Mapping[str, Tensor]) -> Self:
        """The standardisation whose buffers these are, as ``named_buffers`` gave them."""
        made = cls(mean=torch.zeros(1, 1, 1), std=torch.ones(1, 1, 1))
        for name, buffer in buffers.items():
            made.register_buffer(name, buffer)
        return made

    @torch.no_grad()
    def whole(self, images_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
        """All images standardized, in ``dtype``; in pieces, so that no second copy is held."""
        result_NCHW = torch.empty(images_NCHW.shape, dtype=dtype, device=images_NCHW.device)
        for start in range(0, len(images_NCHW), _WHOLE_IMAGES):
            piece = slice(start, start + _WHOLE_IMAGES)
            result_NCHW[piece] = self(images_NCHW[piece])
        return result_NCHW

    def forward(self, images_BCHW: Tensor) -> Tensor:
        divisor = self.divisor if images_BCHW.is_floating_point() else self.divisor_uint8
        x_BCHW = torch.addcdiv(self.shift, images_BCHW.to(self.shift.dtype), divisor)
        if self.whitening is None:
            return x_BCHW
        # Whitening scales small components up a hundredfold: bfloat16 would drown them in noise.
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return (x_BCHW.flatten(1) @ self.whitening).view_as(x_BCHW)


def channel_statistics(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float64 ``[C]`` on the CPU, scale 0 to 1."""
    if images_NCHW.is_floating_point():
        variance_C, mean_C = torch.var_mean(images_NCHW.double(), (0, 2, 3), correction=0)
        return mean_C.cpu(), variance_C.sqrt().cpu()
    count = images_NCHW.numel() // images_NCHW.shape[1]
    sums_C = torch.zeros(images_NCHW.shape[1], dtype=torch.int64, device=images_NCHW.device)
    squares_C = torch.zeros_like(sums_C)
    size = max(1, _CHUNK_VALUES.get(images_NCHW.device.type, 1 << 15) // images_NCHW[0].numel())
    for start in range(0, len(images_NCHW), size):
        x = images_NCHW[start : start + size].to(torch.int32)
        sums_C += x.sum((0, 2, 3), dtype=torch.int64)
        squares_C += (x * x).sum((0, 2, 3), dtype=torch.int64)
    # Python's integers: count times squares exceeds 64 bits from 10,000 CIFAR images on.
    moments = list(zip(sums_C.tolist(), squares_C.tolist(), strict=True))
    means = [total / count / 255 for total, _ in moments]
    deviations = [
        ((square * count - total * total) / (count * count)) ** 0.5 / 255
        for total, square in moments
    ]
    return torch.tensor(means, dtype=torch.float64), torch.tensor(deviations, dtype=torch.float64)

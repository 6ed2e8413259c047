"""Dropout and augmentation of members, each from a random stream of its own.

Alone, a trial draws its augmentation and then, layer by layer, its dropout from one generator that
every epoch seeds (`sweeper.training.device.noise`). Under vmap nothing may draw from K streams. So
the masks of all dropout layers are drawn before the forward pass, member by member and layer by
layer: every generator then gives the same numbers in the same order as alone. Which shapes, in
which order and with which strides is found by one forward pass of a single model, because the
strides decide where in memory the numbers go.

Shapes: ``K`` slots, ``B`` images of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sweeper.config import DataShape
from sweeper.training.precision import Precision


class MaskedDropout(nn.Module):
    """Multiplies by a mask that somebody else has drawn; in evaluation mode it does nothing.

    ``drops`` False leaves the mask out as well.
    """

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(0), persistent=False)
        self.drops = False

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask if self.training and self.drops else x


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A dropout layer, and ones in the shape and strides of what it is given for a batch of one
    size."""

    name: str
    ones: Tensor


def rates_of(model: nn.Module) -> dict[str, float]:
    """The rate of every dropout layer of a model, by the layer's dotted name."""
    return {name: layer.p for name, layer in model.named_modules() if type(layer) is nn.Dropout}


def with_masks(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose dropout layers take masks."""
    masked = copy.deepcopy(model)
    for name in rates_of(model):
        parent, _, leaf = name.rpartition(".")
        setattr(masked.get_submodule(parent), leaf, MaskedDropout())
    return masked


class Noise:
    """The random streams of K slots. ``model`` is any member's, before its first step."""

    def __init__(self, model: nn.Module, *, precision: Precision, device: torch.device) -> None:
        self._model = copy.deepcopy(model)
        for layer in self._model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        self._precision = precision
        self._device = device
        self._sites: dict[int, list[Site]] = {}
        self._rates: list[dict[str, float]] = []
        self.generators: list[torch.Generator] = []

    def configure(self, rates: Sequence[dict[str, float]]) -> None:
        """Set the rates of every slot."""
        self._rates = list(rates)
        missing = len(rates) - len(self.generators)
        self.generators += [torch.Generator(device=self._device) for _ in range(missing)]
        del self.generators[len(rates) :]

    @property
    def program(self) -> tuple[tuple[float, ...], ...]:
        """What a captured step has built in."""
        return tuple(tuple(of_slot.values()) for of_slot in self._rates)

    @property
    def dropping(self) -> set[str]:
        """Layers that drop anything in any slot."""
        return {name for of_slot in self._rates for name, rate in of_slot.items() if rate > 0}

    def seed(self, seeds: Sequence[int]) -> None:
        """Begin an epoch."""
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(seed)

    def prepare(self, batch: int, shape: DataShape) -> None:
        """Find out what the dropout layers are given for batches of this size."""
        if self.dropping and batch not in self._sites:
            size = (batch, shape.channels, shape.height, shape.width)
            blank_BCHW = torch.zeros(size, dtype=self._precision.dtype, device=self._device)
            self._sites[batch] = self._found(blank_BCHW)

    @torch.no_grad()
    def masks(self, batch: int) -> dict[str, Tensor]:
        """Draw the masks [K, …] of the next batch; ask :meth:`prepare` for its size before."""
        dropping = self.dropping
        slots = list(zip(self._rates, self.generators, strict=True))
        return {
            f"{site.name}.mask": torch.stack(
                [
                    _drawn(site.ones, rates.get(site.name, 0.0), generator)
                    for rates, generator in slots
                ]
            )
            for site in (self._sites[batch] if dropping else ())
            if site.name in dropping
        }

    @torch.no_grad()
    def _found(self, x_BCHW: Tensor) -> list[Site]:
        sites: list[Site] = []

        def look(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                sites.append(Site(name=name, ones=torch.ones_like(inputs[0])))

            return hook

        layers = [(n, m) for n, m in self._model.named_modules() if isinstance(m, nn.Dropout)]
        handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers]
        self._model.train()
        with self._precision.forward():
            self._model(x_BCHW)
        for handle in handles:
            handle.remove()
        return sites


def _drawn(ones: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """What ``nn.Dropout`` of this rate would multiply by, drawn as it draws.

    A rate of zero draws nothing. On CUDA dropout is one kernel with a layout of its own, and this
    is the same kernel with a generator to choose.
    """
    if rate == 0:
        return ones
    if ones.is_cuda:
        return torch._fused_dropout(ones, 1 - rate, generator)[0]
    return torch.empty_like(ones).bernoulli_(1 - rate, generator=generator).div_(1 - rate)

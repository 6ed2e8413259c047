"""What a forward pass reads of K rows of weights, and what an update gets for it.

Autocast casts every weight to bfloat16 at every step, and its gradient back: on a GPU two kernels
for each of them, which for a small model is a third of all. Here they are cast where the update has
them at hand anyway, all in one, and their gradients stay as they come. The numbers are the same:
what autocast would cast is cast, by the same rounding, and the update is done in float32 on weights
in float32.

Shapes: ``K`` models, ``P`` numbers in a row, ``Q`` for what is lowered, ``R`` for what is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweeper.training.precision import Precision
from sweeper.training.rows.numbers import ALIGNED, Layout


def lowered_parameters(
    model: nn.Module, precision: Precision, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> frozenset[str]:
    """The parameters that autocast casts to bfloat16: weights and biases of layers of ``kinds``.

    None without autocast, and none with float16, whose gradients have to be scaled back first.
    Under vmap autocast would leave the biases of linear layers, and all that follows them would be
    twice as large as alone; and there it takes no convolution on a CPU, so those are not of the
    ``kinds`` that are taken unasked.
    """
    if precision.autocast is not torch.bfloat16:
        return frozenset()
    return frozenset(
        f"{name}.{of_layer}"
        for name, layer in model.named_modules()
        if type(layer) in kinds
        for of_layer, _ in layer.named_parameters()
    )


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Of what is ``lowered`` [K, Q], in its dtype, and of what is ``kept`` [K, R].

    ``apart``: of the parameters at the head of a row, [K, n] each, as far as ``lowered`` does not
    begin with them.
    """

    lowered: Tensor
    kept: Tensor
    apart: tuple[Tensor, ...] = ()

    def parts(self) -> list[Tensor]:
        """All of it, in the order of a row; none is without numbers."""
        return [part for part in (*self.apart, self.lowered, self.kept) if part.numel()]

    def whole(self) -> Tensor:
        """[K, P], in the dtype of what is kept."""
        return torch.cat([part.to(self.kept.dtype) for part in self.parts()], dim=1)


class Leaves:
    """``named`` parameters [K, shape], by which a loss is differentiated: views of ``weights_KP``,
    or of ``lowered``, a copy in ``dtype`` of its first numbers. ``alone``: of one row, as [shape].

    Each is a leaf of its own: of one row that is split, compiled code would put the gradient
    together piece by piece. Who changes the weights has to :meth:`refresh` the copy.
    """

    def __init__(
        self, weights_KP: Tensor, layout: Layout, dtype: torch.dtype, *, alone: bool = False
    ) -> None:
        self._alone = alone
        self._weights_KP, self.layout = weights_KP, layout
        rows = len(weights_KP)
        self._apart = layout.apart(rows)
        self.lowered = weights_KP.new_zeros(rows, layout.lowered_size, dtype=dtype)
        self._zeros = weights_KP.new_zeros(rows * ALIGNED)
        self._lowered_zeros = self._zeros.to(dtype)
        self.named: dict[str, Tensor] = {}
        for name, place in layout.places.items():
            numbers = self.lowered if name in layout.lowered else self._weights_KP
            leaf = layout.shaped(name, (numbers[0] if alone else numbers)[..., place])
            self.named[name] = leaf.requires_grad_(True)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights once more, in place."""
        self.lowered.copy_(self._weights_KP[:, : self.layout.lowered_size])

    def gradient(self, loss: Tensor) -> Gradient:
        """The gradient of ``loss`` by all weights."""
        found = torch.autograd.grad(loss, list(self.named.values()), materialize_grads=True)
        named = {
            name: value[None] if self._alone else value
            for name, value in zip(self.named, found, strict=True)
        }
        apart = tuple(self.layout.flat(name, named.pop(name)) for name in self._apart)
        rows = self._weights_KP.shape[:1]
        lowered, kept = self.layout.joined(named, self._lowered_zeros, self._zeros, rows=rows)
        return Gradient(lowered=lowered, kept=kept, apart=apart)

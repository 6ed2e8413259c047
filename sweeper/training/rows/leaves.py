"""What a forward pass reads of K rows of weights, and what an update gets for it.

Autocast casts every weight to bfloat16 at every step, and its gradient back: on a GPU two kernels
for each of them, which for a small model is a third of all. Here the parameters of linear layers
are cast where the update has them at hand anyway, all in one, and their gradients stay as they
come. The numbers are the same: what autocast would cast is cast, by the same rounding, and the
update is done in float32 on weights in float32.

Shapes: ``K`` models, ``P`` numbers in a row, ``Q`` that are lowered, ``R`` that are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweeper.training.precision import Precision
from sweeper.training.rows.numbers import Layout


def lowered_parameters(
    model: nn.Module, precision: Precision, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> frozenset[str]:
    """The parameters that autocast casts to bfloat16: weights and biases of layers of ``kinds``.

    None without autocast, and none with float16, whose gradients have to be scaled back first.
    Under vmap autocast would leave the biases, and all that follows a linear layer would be twice
    as large as alone.
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
    """Of ``lowered`` [K, Q], in its dtype, and of ``kept`` [K, R]."""

    lowered: Tensor
    kept: Tensor

    def whole(self, layout: Layout) -> Tensor:
        """[K, P], in the dtype of what is kept."""
        return layout.whole(self.lowered.to(self.kept.dtype), self.kept)


class Leaves:
    """``lowered`` [K, Q], a copy of the first numbers of ``weights_KP`` in ``dtype``, and ``kept``
    [K, R], the others themselves.

    Who changes the weights has to :meth:`refresh` the copy.
    """

    def __init__(self, weights_KP: Tensor, layout: Layout, dtype: torch.dtype) -> None:
        self._weights_KP, self.layout = weights_KP.detach(), layout
        size = len(weights_KP), layout.kept_at  # a row begins where a matrix product likes to read
        memory = torch.empty(size, dtype=dtype, device=weights_KP.device)
        self.lowered = memory[:, : layout.lowered_size].requires_grad_(True)
        self.kept = layout.parted(self._weights_KP)[1].requires_grad_(True)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights once more, in place."""
        if self.layout.lowered_size:
            self.lowered.copy_(self.layout.parted(self._weights_KP)[0])

    def gradient(self, loss: Tensor) -> Gradient:
        """The gradient of ``loss`` by all weights."""
        asked = [leaf for leaf in (self.lowered, self.kept) if leaf.numel()]
        found = iter(torch.autograd.grad(loss, asked))
        lowered, kept = (
            next(found) if leaf.numel() else torch.zeros_like(leaf)
            for leaf in (self.lowered, self.kept)
        )
        return Gradient(lowered=lowered, kept=kept)

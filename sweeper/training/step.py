"""One training step, and the sums that an epoch's metrics are made of.

Shapes: ``B`` images of a batch, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweeper.optim import Loss
from sweeper.training.inputs import Inputs
from sweeper.training.precision import Precision
from sweeper.training.update import Update

Measure = Callable[[Mapping[str, Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]
"""See :meth:`Step.measured`."""


class Totals:
    """Loss and hits of many batches, summed on the device and read once; of ``slots`` trials."""

    def __init__(self, device: torch.device, slots: int = 1) -> None:
        self._loss = torch.zeros(slots, dtype=torch.float64, device=device)
        self._correct = torch.zeros(slots, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Begin anew."""
        self._loss.zero_()
        self._correct.zero_()

    @torch.no_grad()
    def add(self, mean_loss: Tensor, hits: Tensor, count: int) -> None:
        """Count one batch of ``count`` images."""
        self._loss.add_(mean_loss, alpha=count)
        self._correct.add_(hits)

    def means(self, count: int) -> list[tuple[float, float]]:
        """Every slot's mean loss and accuracy over ``count`` images. Waits for the device."""
        sums = torch.stack([self._loss, self._correct.double()], dim=1).tolist()
        return [(loss / count, correct / count) for loss, correct in sums]


def hits_of(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of a batch are right: of logits [..., B, K] and labels [..., B], one number each."""
    return (logits.argmax(-1) == labels).sum(-1)


@dataclass(kw_only=True)
class Step:
    """Gather, augment, forward, loss, backward, clip, update, count.

    The host never waits for the device in here, so a CUDA graph can hold all of it (float16
    with an optimizer that is not fused excepted: ``GradScaler`` then asks the device whether to
    skip the update). ``measure`` is :meth:`measured`, compiled or not, for full batches only: every
    other size would be compiled again.
    """

    model: nn.Module
    update: Update
    loss: Loss
    inputs: Inputs
    precision: Precision
    totals: Totals

    def __post_init__(self) -> None:
        self.measure: Measure = self.measured

    def full(self, index_B: Tensor) -> None:
        """Train on a batch of the configured size."""
        self._train(index_B, self.measure)

    def partial(self, index_B: Tensor) -> None:
        """Train on a batch of any other size."""
        self._train(index_B, self.measured)

    def measured(
        self, weights: Mapping[str, Tensor], x_BCHW: Tensor, labels_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and hits of a batch: what ``train.compile`` compiles, both passes.

        Summed outside: torch 2.11 loses what compiled code adds to a tensor that it was not given.
        """
        logits_BK = self.update.logits(weights, x_BCHW)
        return self.loss(logits_BK, labels_B), hits_of(logits_BK, labels_B)

    def _train(self, index_B: Tensor, measure: Measure) -> None:
        x_BCHW, labels_B = self.inputs.take(index_B)
        with self.precision.forward():
            loss, hits = measure(self.update.weights, x_BCHW, labels_B)
        self.update.apply(loss)
        self.totals.add(loss, hits, len(labels_B))

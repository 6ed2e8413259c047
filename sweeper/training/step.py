"""One training step, and the sums that an epoch's metrics are made of.

Shapes: ``B`` images of a batch, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweeper.optim import Loss
from sweeper.training.inputs import Inputs
from sweeper.training.precision import Precision
from sweeper.training.update import Forward, Update


class Totals:
    """Loss and hits of many batches, summed on the device and read once."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Begin anew."""
        self._loss.zero_()
        self._correct.zero_()

    def add(self, mean_loss: Tensor, logits_BK: Tensor, labels_B: Tensor) -> None:
        """Count one batch. No gradient may be recorded here."""
        self._loss.add_(mean_loss, alpha=len(labels_B))
        self._correct.add_((logits_BK.argmax(1) == labels_B).sum())

    def means(self, count: int) -> tuple[float, float]:
        """Mean loss and accuracy over ``count`` images. Waits for the device."""
        loss, correct = torch.stack([self._loss, self._correct.double()]).tolist()
        return loss / count, correct / count


@dataclass(kw_only=True)
class Step:
    """Gather, augment, forward, loss, backward, clip, update, count.

    The host never waits for the device in here, so a CUDA graph can hold all of it (float16
    with an optimizer that is not fused excepted: ``GradScaler`` then asks the device whether to
    skip the update). ``compiled`` runs full batches only: every other size would be compiled again.
    """

    model: nn.Module
    update: Update
    loss: Loss
    inputs: Inputs
    precision: Precision
    totals: Totals

    def __post_init__(self) -> None:
        self.compiled: Forward = self.update.forward

    def full(self, index_B: Tensor) -> None:
        """Train on a batch of the configured size."""
        self._train(index_B, self.compiled)

    def partial(self, index_B: Tensor) -> None:
        """Train on a batch of any other size."""
        self._train(index_B, self.update.forward)

    def _train(self, index_B: Tensor, forward: Forward) -> None:
        x_BCHW, labels_B = self.inputs.take(index_B)
        with self.precision.forward():
            logits_BK = forward(x_BCHW)
        loss = self.loss(logits_BK, labels_B)
        self.update.apply(loss)
        with torch.no_grad():
            self.totals.add(loss, logits_BK, labels_B)

"""One training step, and the sums that an epoch's metrics are made of.

Shapes: ``B`` images of a batch, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sweeper.optim import Loss
from sweeper.training.inputs import Inputs
from sweeper.training.precision import Precision


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
    compiled: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    loss: Loss
    inputs: Inputs
    precision: Precision
    clip_norm: float | None
    totals: Totals

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scaler = self.precision.scaler()

    def full(self, index_B: Tensor) -> None:
        """Train on a batch of the configured size."""
        self._train(index_B, self.compiled)

    def partial(self, index_B: Tensor) -> None:
        """Train on a batch of any other size."""
        self._train(index_B, self.model)

    def forget_gradients(self) -> None:
        """Free the gradients; the next backward pass then writes them instead of adding."""
        for parameter in self.parameters:
            parameter.grad = None

    def _train(self, index_B: Tensor, model: Callable[[Tensor], Tensor]) -> None:
        x_BCHW, labels_B = self.inputs.take(index_B)
        with self.precision.forward():
            logits_BK = model(x_BCHW)
        loss = self.loss(logits_BK, labels_B)
        self.forget_gradients()
        self._update(loss)
        with torch.no_grad():
            self.totals.add(loss, logits_BK, labels_B)

    def _update(self, loss: Tensor) -> None:
        if self.scaler is None:
            torch.autograd.backward(loss)
            self._clip()
            self.optimizer.step()
            return
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _clip(self) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)

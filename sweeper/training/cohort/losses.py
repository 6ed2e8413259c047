"""The losses of `sweeper.optim.make_loss` for K members, each with its own label smoothing.

Shapes: ``K`` members, ``B`` images of a batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


class CohortLoss:
    """``loss(logits_KBC, labels_KB)`` is [K], the mean loss of every member's batch."""

    def __init__(
        self,
        kind: Literal["cross_entropy", "mse"],
        smoothing: Sequence[float],
        *,
        classes: int,
        device: torch.device,
    ) -> None:
        self._kind = kind
        self._classes = classes
        self._smoothing_K = torch.tensor(smoothing, dtype=torch.float64, device=device)
        self.smooths = any(smoothing)

    def configure(self, smoothing: Sequence[float]) -> None:
        """Set every member's smoothing, in place."""
        self._smoothing_K.copy_(torch.tensor(smoothing, dtype=torch.float64))
        self.smooths = any(smoothing)

    def __call__(self, logits_KBC: Tensor, labels_KB: Tensor) -> Tensor:
        """``labels`` may be [1, B] where all members see the same images."""
        dtype = torch.promote_types(logits_KBC.dtype, torch.float32)
        logits_KBC, smoothing_K = logits_KBC.to(dtype), self._smoothing_K.to(dtype)
        labels_KB = labels_KB.expand(logits_KBC.shape[:2])
        classes_C = torch.arange(self._classes, device=labels_KB.device)
        is_label_KBC = labels_KB[..., None] == classes_C
        if self._kind == "mse":
            share_K11 = smoothing_K[:, None, None]
            target_KBC = is_label_KBC.to(dtype) * (1 - share_K11) + share_K11 / self._classes
            return (logits_KBC - target_KBC).square().mean(dim=(1, 2))
        logarithms_KBC = functional.log_softmax(logits_KBC, dim=-1)
        # as gather would pick them, whose backward pass takes a GPU three times as long
        picked_KB = torch.where(is_label_KBC, logarithms_KBC, 0).sum(dim=-1)
        loss_K = -picked_KB.mean(dim=1)
        if not self.smooths:
            return loss_K
        even_K = -logarithms_KBC.sum(-1).mean(-1)
        mixed_K = (1 - smoothing_K) * loss_K + even_K * (smoothing_K / self._classes)
        return torch.where(smoothing_K > 0, mixed_K, loss_K)

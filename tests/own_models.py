"""Models of a user's own, for studies under test."""

from __future__ import annotations

import time

from torch import Tensor, nn

BATCH_S = 0.04


def broken() -> nn.Module:
    """A model whose training crashes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(model, _FailsOnBatches())


class _FailsOnBatches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise ZeroDivisionError("this model fails on purpose")
        return x


def unhurried() -> nn.Module:
    """A model that learns, at a pace of its own: a batch takes no less than ``BATCH_S``."""
    return nn.Sequential(_Paced(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


class _Paced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(BATCH_S)
        return x

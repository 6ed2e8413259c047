"""Models of a user's own, for studies under test."""

from __future__ import annotations

from torch import Tensor, nn


def broken() -> nn.Module:
    """A model whose training crashes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(model, _FailsOnBatches())


class _FailsOnBatches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise ZeroDivisionError("this model fails on purpose")
        return x

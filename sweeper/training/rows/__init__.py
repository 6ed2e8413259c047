"""Models as rows of one matrix: the numbers of all weights next to each other, and their update.

``numbers`` says where in a row a parameter lies and converts to what torch keeps, ``leaves`` is
what a forward pass reads of it and is differentiated by, ``optimizer`` has the update rules, and
``fused`` all of them in one kernel for a GPU.
"""

from __future__ import annotations

from typing import Final

from sweeper.config import TrialConfig

RULES: Final = frozenset({"sgd", "momentum", "nesterov", "adam", "adamw"})
"""Optimizers by the names of the configuration."""

_FAMILIES: Final = frozenset({"mlp", "mixer", "cnn", "vit"})
"""Models that use a layer's parameters in that layer alone."""


def fits(config: TrialConfig) -> bool:
    """Whether a trial that trains alone can be a row."""
    return (
        config.model.name in _FAMILIES
        and config.optimizer.name in RULES
        and config.train.precision != "float16"  # whose gradients have to be scaled back
        and not config.train.layer_statistics  # which look at every gradient
    )

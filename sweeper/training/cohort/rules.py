"""Which trials can train as one batch, and which can train beside others at all."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, Literal

import torch

from sweeper.config import TrialConfig
from sweeper.config.model import Svm
from sweeper.space import FUSIBLE
from sweeper.training.rows import RULES

Way = Literal["alone", "cohort", "streams"]
"""How a trial trains: by itself in its worker, in one batch with others of its structure, or beside
others with a captured step and a stream of its own."""

FAMILIES: Final = frozenset({"mlp", "mixer", "cnn", "vit"})
"""Models whose forward pass gives every member what it gives alone (tested in float64)."""


def why_alone(config: TrialConfig, device: torch.device) -> str | None:
    """Why a trial of this configuration cannot join a cohort on ``device``, or None if it can."""
    model, optimizer, train = config.model, config.optimizer, config.train
    if model.name not in FAMILIES:
        return f"model {model.name} is none of {_listed(FAMILIES)}"
    if optimizer.name not in RULES:
        return f"optimizer {optimizer.name} is none of {_listed(RULES)}"
    if train.precision == "float16":
        return "loss scaling for float16 is one trial's"
    if train.layer_statistics:
        return "layer statistics are taken from one model's gradients"
    if train.graph == "on" and device.type != "cuda":
        return "train.graph: on needs a CUDA device"
    return None


def why_not_beside(config: TrialConfig, device: torch.device) -> str | None:
    """Why a trial of this configuration cannot train beside others at all, or None if it can.

    A cohort compiles one step for all its members; in lanes every trial would compile its own.
    """
    if isinstance(config.model, Svm):
        return "a support vector machine has no steps that others could take turns with"
    if config.train.compile == "on" and (reason := why_alone(config, device)):
        return f"train.compile is on, and there is no cohort to compile for: {reason}"
    return None


def structure(config: TrialConfig) -> str:
    """A short text that two trials share if they fit into one cohort: all but what may differ.

    What may differ is `sweeper.space.FUSIBLE`.
    """
    kept = _without(config.model_dump(mode="json"), "")
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _without(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    result = {}
    for key, value in tree.items():
        path = prefix + key
        if path in FUSIBLE:
            continue
        result[key] = _without(value, f"{path}.") if isinstance(value, dict) else value
    return result


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))

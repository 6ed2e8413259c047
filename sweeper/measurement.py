"""What training says of itself, once an epoch: the one value that flows from training to the rest.

Training yields it, the store gets the objective's part of it, the tracker gets all of it, and the
report reads it back. No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

EPOCH_METRICS: Final[Mapping[str, str]] = {
    "train_loss": "mean training loss over the epoch, as trained (augmented, with dropout)",
    "train_accuracy": "share of training images classified right during the epoch, 0 to 1",
    "val_loss": "mean loss on the validation part after the epoch",
    "val_accuracy": "share of validation images classified right after the epoch, 0 to 1",
    "lr": "learning rate of the epoch's last step",
    "seconds": "seconds of wall time for training, without validation",
    "val_seconds": "seconds of wall time for validation",
    "samples_per_s": "training images a second",
    "peak_memory_mib": "highest memory in use so far: device memory on a GPU, the process on a CPU",
}
"""Metrics of every :class:`Measurement`, with units."""

FINAL_METRICS: Final[Mapping[str, str]] = {
    "test_loss": "mean loss on the test set, with the weights of the best validation epoch",
    "test_accuracy": "test accuracy with the weights of the best validation epoch, 0 to 1",
    "test_loss_last": "mean loss on the test set after the last epoch",
    "test_accuracy_last": "test accuracy after the last epoch, 0 to 1",
    "best_epoch": "the epoch with the best objective on the validation part, counted from 1",
}
"""What a trial that ran to its end knows besides, read once after training."""

OBJECTIVE_METRICS: Final[Mapping[str, str]] = {
    "val_accuracy": "maximize",
    "val_loss": "minimize",
    "train_accuracy": "maximize",
    "train_loss": "minimize",
    "seconds": "minimize",
    "samples_per_s": "maximize",
    "peak_memory_mib": "minimize",
}
"""Metrics that a study may optimize, with the direction that makes sense. No test metric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One epoch of one trial.

    ``epoch`` counts from 1 (epochs completed). ``metrics`` holds every key of
    :data:`EPOCH_METRICS` that applies; further keys (layer statistics) may follow.
    """

    epoch: int
    metrics: Mapping[str, float]

    @property
    def finite(self) -> bool:
        """False once the loss is NaN or infinite: the trial has diverged."""
        return all(
            math.isfinite(self.metrics[name])
            for name in ("train_loss", "val_loss")
            if name in self.metrics
        )


SUMMARY_METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "max_train_accuracy": ("train_accuracy", "max"),
    "max_val_accuracy": ("val_accuracy", "max"),
    "min_train_loss": ("train_loss", "min"),
    "min_val_loss": ("val_loss", "min"),
    "mean_seconds": ("seconds", "mean"),
    "mean_val_seconds": ("val_seconds", "mean"),
}
"""What is kept of a trial's epochs with its result: name → (epoch metric, how it is put together).

The names that published tables are compared under, beside :data:`FINAL_METRICS`.
"""


def summary(epochs: Sequence[Measurement]) -> dict[str, float]:
    """:data:`SUMMARY_METRICS` of a trial's epochs, and every metric of the last one."""
    if not epochs:
        return {}
    result = dict(epochs[-1].metrics)
    for name, (metric, how) in SUMMARY_METRICS.items():
        series = [epoch.metrics[metric] for epoch in epochs if metric in epoch.metrics]
        finite = [value for value in series if math.isfinite(value)]
        if finite:
            mean = sum(finite) / len(finite)
            result[name] = {"max": max(finite), "min": min(finite), "mean": mean}[how]
    return result

"""Training: a trial's configuration and a data set in, one Measurement an epoch out."""

from __future__ import annotations

from pathlib import Path

import torch

from sweeper.config import TrialConfig
from sweeper.config.model import Svm
from sweeper.data import Dataset, load
from sweeper.errors import UsageError
from sweeper.training.base import Interrupt, Interrupted, Training, TrainingClosedError, Trial
from sweeper.training.capture import CaptureError
from sweeper.training.compiling import Compiling
from sweeper.training.device import best_device, resolved
from sweeper.training.estimate import estimate_s
from sweeper.training.loop import NetworkTraining
from sweeper.training.svm import SvmTraining

__all__ = [
    "CaptureError",
    "Compiling",
    "Interrupt",
    "Interrupted",
    "Training",
    "TrainingClosedError",
    "Trial",
    "best_device",
    "estimate_s",
    "prepare",
]


def prepare(
    config: TrialConfig,
    *,
    folder: Path,
    device: torch.device | None = None,
    dataset: Dataset | None = None,
    objective: tuple[str, bool] = ("val_accuracy", True),
    compiling: Compiling | None = None,
) -> Training:
    """A trial, ready to be trained: data loaded, model built, step captured where that works.

    ``dataset`` is used instead of loading ``config.data`` from ``folder``; it has to be on
    ``device`` (None: :func:`best_device`). ``objective`` is the metric of `sweeper.measurement`
    that decides which epoch is best, and whether more of it is better. ``compiling`` is what
    ``train.compile: auto`` goes by; without, it compiles nothing.

    Raises DataNotFoundError where the data are missing, MissingExtraError where a package is, and
    UsageError for a configuration that cannot be trained here; CaptureError for ``train.graph: on``
    where the step cannot be captured. ``train.compile: on`` raises UsageError or MissingExtraError
    where the step cannot be compiled.
    """
    device = best_device() if device is None else resolved(device)
    if dataset is None:
        dataset = load(config.data, folder=folder, device=device)
    elif dataset.train.images.device != device:
        raise UsageError(
            f"the data set must be on {device}, but it is on {dataset.train.images.device}"
        )
    if isinstance(config.model, Svm):
        return SvmTraining(config, dataset=dataset, device=device, objective=objective)
    return NetworkTraining(
        config, dataset=dataset, device=device, objective=objective, compiling=compiling
    )

"""The best model of a study, whole: from raw images to class scores."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from sweeper.data import load
from sweeper.models import build
from sweeper.settings import Settings
from sweeper.store import StoredStudy, TrialRow


def deployable(
    study: StoredStudy, trial: TrialRow, settings: Settings, weights: Path
) -> tuple[nn.Module, NDArray[np.float32]]:
    """The trial's model behind its own standardisation, and two test images as an example.

    ``weights`` is the safetensors file that its worker kept.

    It takes float images ``[B, C, H, W]`` with values in 0 to 1 and returns scores
    ``[B, classes]``. Raises DataNotFoundError where the data, whose statistics the
    standardisation needs, are not on this machine.
    """
    config = study.spec.trial_config(trial.params)
    dataset = load(config.data, folder=settings.data, device=torch.device("cpu"))
    network = build(config.model, dataset.shape)
    network.load_state_dict(load_file(weights))
    module = nn.Sequential(OrderedDict(standardize=dataset.standardize, network=network))
    images = dataset.test.images[:2]
    example = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return module.eval(), example.numpy()

"""The best model of a study: its weights, its data, what it predicts, and whole for deployment.

Shapes: B images of a batch, C channels, H and W of the image, n images that were predicted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sweeper.config import DataConfig, TrialConfig
from sweeper.config.model import Custom, Svm
from sweeper.data import Dataset, load
from sweeper.errors import (
    DataNotFoundError,
    SweeperError,
    TrackerRefusedError,
    TrackerUnreachableError,
    UsageError,
)
from sweeper.models import build
from sweeper.report.collect import Say, StudyData, silent
from sweeper.settings import WEIGHTS_FILE, WEIGHTS_FOLDER, Settings
from sweeper.store import TrialRow
from sweeper.tracking import mlflow
from sweeper.tracking.service import readable_uri
from sweeper.training.device import best_device
from sweeper.training.evaluation import evaluation_batch

_PLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "mnist": ("MNIST/raw",),
    "fashion_mnist": ("FashionMNIST/raw",),
    "kmnist": ("KMNIST/raw",),
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
}
"""Where data sets lie under the data folder: a report downloads none."""
_PROBED: Final = 16
_GPU_SETUP_S: Final = 2.0
"""About what the first use of a GPU takes a process."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """The weights of a trial, as its worker kept them after the best epoch."""

    trial: TrialRow
    run_id: str
    config: TrialConfig
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class BestModel:
    """A trial's network with its weights, in evaluation mode on the CPU, and its data set."""

    weights: Weights
    dataset: Dataset
    network: nn.Module

    def deployable(self) -> tuple[nn.Module, NDArray[np.float32]]:
        """The network behind its standardisation, and two test images as an example.

        It takes float images ``[B, C, H, W]`` with values in 0 to 1 and returns scores
        ``[B, classes]``.
        """
        module = nn.Sequential(
            OrderedDict(standardize=self.dataset.standardize, network=self.network)
        )
        images = self.dataset.test.images[:2]
        example = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return module.eval(), example.numpy()


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a model says of ``n`` of ``total`` test images: all of them, or as many as there was
    time for, drawn at random. ``confidence`` is the softmax of the predicted class."""

    index_n: NDArray[np.int64]
    label_n: NDArray[np.int64]
    predicted_n: NDArray[np.int64]
    confidence_n: NDArray[np.float32]
    total: int


def best_weights(data: StudyData, settings: Settings) -> Weights:
    """The weights of the best trial, from its run's artifacts; of trials that are equally good,
    the one whose worker kept them.

    Raises SweeperError with the reason in one line where there are none.
    """
    best = data.now.best
    if best is None:
        raise UsageError("no trial has completed")
    config = data.now.spec.trial_config(best.params)
    if isinstance(config.model, Custom) and not data.allow_imports:
        raise UsageError(
            f"the best model, {config.model.name}, must be imported to be shown, and code named by "
            "a study of the store must be allowed: sweeper report --allow-imports"
        )
    if isinstance(config.model, Svm):
        raise UsageError("a support vector machine has no weights to show")
    uri = readable_uri(settings)
    if uri is None or not data.runs:
        raise TrackerUnreachableError(data.tracker_problem or "nothing was tracked")
    equal = [row for row in data.now.leaderboard if row.values[0] == best.values[0]]
    client = mlflow.connect(uri)
    with TemporaryDirectory() as folder:
        for row in equal:
            run = data.run(row)
            if run is None:
                continue
            try:
                file = mlflow.download_artifact(
                    client, run.run_id, f"{WEIGHTS_FOLDER}/{WEIGHTS_FILE}", Path(folder)
                )
                tensors = load_file(file)
            except (TrackerRefusedError, SafetensorError, OSError):
                continue
            return Weights(
                trial=row,
                run_id=run.run_id,
                config=data.now.spec.trial_config(row.params),
                tensors=tensors,
            )
    raise TrackerRefusedError(f"the run of trial {best.number} has no weights")


def best_model(weights: Weights, settings: Settings) -> BestModel:
    """The network of ``weights`` with its data. Raises SweeperError where either cannot be had;
    nothing is downloaded."""
    config = weights.config
    _must_be_here(config.data, settings.data)
    dataset = load(config.data, folder=settings.data, device=torch.device("cpu"))
    network = build(config.model, dataset.shape)
    try:
        network.load_state_dict(dict(weights.tensors))
    except RuntimeError as error:
        raise UsageError(
            f"the weights of trial {weights.trial.number} do not fit its model: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return BestModel(weights=weights, dataset=dataset, network=network.eval())


def _must_be_here(config: DataConfig, folder: Path) -> None:
    places = _PLACES.get(config.name)
    if places and not any((folder / place).exists() for place in places):
        raise DataNotFoundError(f"the data set {config.name} is not in {folder}")


@torch.inference_mode()
def predict(model: BestModel, *, limit_s: float, say: Say = silent) -> Predictions:
    """Predict the test set, for ``limit_s`` seconds at most (one batch at least)."""
    dataset, test = model.dataset, model.dataset.test
    network = nn.Sequential(dataset.standardize, model.network).eval()
    until = time.monotonic() + limit_s
    device = _fitting_device(network, test.images)
    network.to(device)
    batch = min(512, evaluation_batch(model.weights.config.model, dataset.shape, device))
    order_N = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    confidence: list[Tensor] = []
    predicted: list[Tensor] = []
    done = 0
    try:
        while done < len(test) and (done == 0 or time.monotonic() < until):
            index_B = order_N[done : done + batch]
            scores_BK = network(test.images[index_B].to(device)).float()
            confidence_B, predicted_B = scores_BK.softmax(1).max(1)
            confidence.append(confidence_B.cpu())
            predicted.append(predicted_B.cpu())
            done += len(index_B)
            say(f"testing the best model: {done:,} of {len(test):,} images")
    finally:
        network.cpu()
    index_n = order_N[:done]
    return Predictions(
        index_n=index_n.numpy(),
        label_n=test.labels[index_n].numpy(),
        predicted_n=torch.cat(predicted).numpy(),
        confidence_n=torch.cat(confidence).numpy(),
        total=len(test),
    )


def _fitting_device(network: nn.Module, images: Tensor) -> torch.device:
    """The GPU, if there is one and ``images`` take the CPU longer than a process needs to set up
    what it has to have on a GPU; measured with the first of them."""
    cpu = torch.device("cpu")
    if not torch.cuda.is_available():
        return cpu
    few = images[:_PROBED]
    network(few)
    began = time.monotonic()
    network(few)
    seconds = (time.monotonic() - began) * len(images) / len(few)
    return cpu if seconds < _GPU_SETUP_S else best_device()


def why(error: SweeperError) -> str:
    """An error in one line."""
    return " ".join(str(error).split())

"""A support vector machine as a trial: fitted once, one Measurement (report R1a)."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sweeper.config import TrialConfig
from sweeper.config.model import Svm
from sweeper.data import Dataset, Part
from sweeper.errors import UsageError
from sweeper.measurement import Measurement
from sweeper.training.base import Interrupt, Training, TrainingClosedError
from sweeper.training.device import peak_memory_mib

_CPU = torch.device("cpu")


class SvmTraining(Training):
    """scikit-learn's support vector machine, on the CPU whatever ``device`` is.

    It has one epoch whatever ``train.epochs`` says, and no learning rate; its losses are mean hinge
    losses. The sections ``optimizer`` and ``train`` and augmentation mean nothing to it. It has no
    parameters that are trained one by one (``parameters`` is 0) and no weights.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        dataset: Dataset,
        device: torch.device,
        objective: tuple[str, bool],
    ) -> None:
        super().__init__(config, dataset=dataset, device=device, objective=objective)
        from sweeper.models.svm import SvmModel  # scikit-learn takes a second to load

        if not isinstance(config.model, Svm):
            raise UsageError(f"the model must be svm, but got {config.model.name}")
        self.parameters = 0
        self.notes["device"] = "cpu, scikit-learn"
        self._model: SvmModel | None = SvmModel(config.model)
        self._fitted = False

    def epochs(self, *, interrupt: Interrupt | None = None) -> Generator[Measurement, None, None]:
        """See :meth:`Training.epochs`; ``interrupt`` cannot end a fit."""
        if self._fitted:
            return
        model = self._open()
        x_nF, y_n = self._arrays(self.dataset.train)
        started = time.perf_counter()
        model.fit(x_nF, y_n)
        seconds = time.perf_counter() - started
        validating = time.perf_counter()
        val_loss, val_accuracy = self._scored(self.dataset.val)
        val_seconds = time.perf_counter() - validating
        train_loss, train_accuracy = self._scored(self.dataset.train)
        self._fitted = True
        yield Measurement(
            epoch=1,
            metrics={
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "lr": 0.0,
                "seconds": seconds,
                "val_seconds": val_seconds,
                "samples_per_s": len(y_n) / seconds,
                "peak_memory_mib": peak_memory_mib(_CPU),
            },
        )

    def best_weights(self) -> dict[str, Tensor]:
        """Empty: a support vector machine has no torch weights."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Empty: a fit that was lost is made anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""

    def close(self) -> None:
        """See :meth:`Trial.close`."""
        self._model = None

    def _tested(self) -> dict[str, float]:
        if not self._fitted:
            raise UsageError("the test set is read after training, but nothing was trained yet")
        loss, accuracy = self._scored(self.dataset.test)
        return {
            "test_loss": loss,
            "test_accuracy": accuracy,
            "test_loss_last": loss,
            "test_accuracy_last": accuracy,
            "best_epoch": 1.0,
        }

    def _open(self) -> Any:
        if self._model is None:
            raise TrainingClosedError
        return self._model

    def _scored(self, part: Part) -> tuple[float, float]:
        x_nF, y_n = self._arrays(part)
        model = self._open()
        return model.hinge(x_nF, y_n), model.accuracy(x_nF, y_n)

    @torch.no_grad()
    def _arrays(self, part: Part) -> tuple[NDArray[Any], NDArray[Any]]:
        images = self.dataset.standardize(part.images).flatten(1).double().cpu().numpy()
        return np.asarray(images), np.asarray(part.labels.cpu().numpy())

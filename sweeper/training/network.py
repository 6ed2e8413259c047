"""What is the same of a network's trial, whether it trains alone or with others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sweeper.config import TrialConfig
from sweeper.data import Dataset
from sweeper.errors import TrialDivergedError
from sweeper.measurement import Measurement
from sweeper.optim import make_schedule
from sweeper.training.base import Trial
from sweeper.training.device import peak_memory_mib


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one pass over a part of the data gave."""

    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best epoch so far, with a copy of the model's state on the device."""

    epoch: int
    value: float
    weights: dict[str, Tensor]


class NetworkTrial(Trial):
    """The epochs of a torch model: which one it is at, which one was the best, what comes next."""

    def __init__(
        self,
        config: TrialConfig,
        *,
        dataset: Dataset,
        device: torch.device,
        objective: tuple[str, bool],
    ) -> None:
        super().__init__(config, dataset=dataset, device=device, objective=objective)
        self._schedule = make_schedule(config.optimizer, config.train.epochs)
        self._epoch = 0
        self._best: Best | None = None
        self._room: dict[str, Tensor] | None = None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done: then there is nothing to train."""
        return self._epoch >= self.config.train.epochs

    @property
    def testable(self) -> bool:
        """Whether there are best weights to test, and they were not tested yet."""
        return self._best is not None and self._test is None

    def best_weights(self) -> dict[str, Tensor]:
        """See :meth:`Trial.best_weights`."""
        return {name: value.cpu() for name, value in self._decided().weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Trial.state_dict`."""
        engine, best = self._engine_state(), self._best
        kept = {}
        if best is not None:  # copied: the next epochs write into the memory of the best weights
            kept = {name: value.to("cpu", copy=True) for name, value in best.weights.items()}
        return {
            "epoch": self._epoch,
            "engine": engine,
            "schedule": self._schedule.state_dict(),
            "best": None
            if best is None
            else {"epoch": best.epoch, "value": best.value, "weights": kept},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Trial.load_state_dict`."""
        self._restore_engine(state["engine"])
        self._schedule.load_state_dict(state["schedule"])
        self._epoch = state["epoch"]
        best = state["best"]
        self._best = None
        if best is not None:
            self._keep(best["weights"], epoch=best["epoch"], value=best["value"])

    @abstractmethod
    def _engine_state(self) -> dict[str, Any]:
        """Model, optimizer and loss scaling (`sweeper.training.state`).

        Raises TrainingClosedError once the trial is closed, as the next two.
        """

    @abstractmethod
    def _restore_engine(self, state: Mapping[str, Any]) -> None:
        """Put :meth:`_engine_state` back."""

    @abstractmethod
    def _weights(self) -> Mapping[str, Tensor]:
        """The model's state as it is, on the device, not copied."""

    def _concluded(
        self, trained: Pass, validated: Pass, further: Mapping[str, float] | None = None
    ) -> Measurement:
        """Count one more epoch, with the learning rate of the schedule; remember it if it is the
        best. Where memory does not suffice nothing is counted."""
        self._reserved()
        metrics = {
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "val_loss": validated.loss,
            "val_accuracy": validated.accuracy,
            "lr": self._schedule.lr,
            "seconds": trained.seconds,
            "val_seconds": validated.seconds,
            "samples_per_s": len(self.dataset.train) / trained.seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
            **(further or {}),
        }
        self._epoch += 1
        measurement = Measurement(epoch=self._epoch, metrics=metrics)
        self._schedule.step(metrics)
        if measurement.finite:
            self._remember(metrics)
        return measurement

    def _reserved(self) -> dict[str, Tensor]:
        """Memory for the best weights, taken where it is not yet."""
        if self._room is None:
            self._room = {name: torch.empty_like(value) for name, value in self._weights().items()}
        return self._room

    def _remember(self, metrics: Mapping[str, float]) -> None:
        """Keep the weights if this epoch is the best."""
        best = self._best
        if self._beats(metrics, best.value if best else None):
            self._keep(self._weights(), epoch=self._epoch, value=metrics[self.objective[0]])

    def _keep(self, weights: Mapping[str, Tensor], *, epoch: int, value: float) -> None:
        kept = self._reserved()
        for name, tensor in weights.items():
            kept[name].copy_(tensor)
        self._best = Best(epoch=epoch, value=value, weights=kept)

    def _forget_best(self) -> None:
        self._best = self._room = None

    def _decided(self) -> Best:
        """Raises TrainingClosedError, or TrialDivergedError where no epoch had a finite value."""
        self._weights()
        if self._best is None:
            raise TrialDivergedError(
                f"an epoch with a finite {self.objective[0]} is needed, but none of "
                f"{self._epoch} had one"
            )
        return self._best

    def _final(self, *, last: Pass, at_best: Pass) -> dict[str, float]:
        """FINAL_METRICS of two passes over the test set."""
        return {
            "test_loss": at_best.loss,
            "test_accuracy": at_best.accuracy,
            "test_loss_last": last.loss,
            "test_accuracy_last": last.accuracy,
            "best_epoch": float(self._decided().epoch),
        }

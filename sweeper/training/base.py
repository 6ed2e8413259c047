"""What a worker sees of a trial in training, whatever trains in it.

A :class:`Trial` has results and a state. A :class:`Training` is a trial that trains by itself.
Others train together: as members of a cohort (`sweeper.training.cohort`), and trials of any
structure side by side (`sweeper.training.crew`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from sweeper.config import TrialConfig
from sweeper.data import Dataset
from sweeper.errors import SweeperError
from sweeper.measurement import Measurement

Interrupt = Callable[[], bool]
"""Asked before every batch, without waiting for the device: True ends training there."""


class Interrupted(SweeperError):  # noqa: N818 - an ending that was asked for, not a mistake
    """Training was asked to end in the middle of an epoch."""


class TrainingClosedError(SweeperError):
    """The training was closed, and its model is gone."""


class Trial(ABC):
    """One trial in training, used by one thread.

    ``parameters`` counts the trainable ones. ``notes`` say how the trial is run (precision, CUDA
    graph or why not, …), each a short text under a short name. ``objective`` is the metric that
    decides which epoch is the best, and whether more of it is better.
    """

    parameters: int

    def __init__(
        self,
        config: TrialConfig,
        *,
        dataset: Dataset,
        device: torch.device,
        objective: tuple[str, bool],
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.device = device
        self.objective = objective
        self.notes: dict[str, str] = {"device": _named(device)}
        self._test: dict[str, float] | None = None

    def test(self) -> dict[str, float]:
        """FINAL_METRICS: the test set, read once, with the last and with the best weights.

        The best weights are those of the epoch with the best objective. Raises TrialDivergedError
        where no epoch had a finite one, and TrainingClosedError once the training is closed.
        """
        if self._test is None:
            self._test = self._tested()
        return dict(self._test)

    @abstractmethod
    def _tested(self) -> dict[str, float]:
        """Read the test set; called once."""

    @abstractmethod
    def best_weights(self) -> dict[str, Tensor]:
        """The model's state after the best epoch, on the CPU; empty where it has no weights.

        Raises TrialDivergedError where no epoch had a finite objective.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on after the last finished epoch; call it between epochs.

        CPU tensors and plain values only, as ``torch.load(weights_only=True)`` accepts them.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, which has to come from a trial of the same configuration."""

    @abstractmethod
    def close(self) -> None:
        """Free everything but the configuration and the data set. May be called again."""

    def _beats(self, metrics: Mapping[str, float], best: float | None) -> bool:
        """Is this epoch's objective finite and better than ``best``? A tie is not better."""
        name, maximize = self.objective
        value = metrics[name]
        if not math.isfinite(value):
            return False
        return best is None or (value > best if maximize else value < best)


class Training(Trial):
    """One trial that trains by itself: made by :func:`sweeper.training.prepare`."""

    @abstractmethod
    def epochs(self, *, interrupt: Interrupt | None = None) -> Generator[Measurement, None, None]:
        """Train; one Measurement an epoch, beginning after the last finished one.

        Ends after ``train.epochs``, or after a measurement that is not finite. A generator: to
        close it before is to give the trial up, and frees model, optimizer and graph. Raises
        Interrupted as soon as ``interrupt`` says so; the running epoch is then lost.
        """


class Poll:
    """Raises Interrupted once ``interrupt`` says so."""

    def __init__(self, interrupt: Interrupt | None) -> None:
        self._interrupt = interrupt

    def __call__(self) -> None:
        if self._interrupt is not None and self._interrupt():
            raise Interrupted


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} {'thread' if threads == 1 else 'threads'}"

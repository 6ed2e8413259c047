"""Training of a network: configuration and data in, one Measurement an epoch out."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sweeper.config import TrialConfig
from sweeper.data import Dataset
from sweeper.errors import TrialDivergedError
from sweeper.measurement import Measurement
from sweeper.optim import make_schedule
from sweeper.training.base import Interrupt, Interrupted, Training, TrainingClosedError
from sweeper.training.device import forget_peak_memory, peak_memory_mib
from sweeper.training.engine import Engine
from sweeper.training.inputs import Inputs
from sweeper.training.layers import layer_statistics
from sweeper.training.state import model_state


@dataclass(kw_only=True)
class _Best:
    """The best epoch so far, with a copy of the model's state on the device."""

    epoch: int
    value: float
    weights: dict[str, Tensor]


class NetworkTraining(Training):
    """A torch model, trained epoch by epoch.

    Data order, dropout, augmentation and initial weights come from ``train.seed``. On a CPU the
    same configuration with the same number of threads gives the same numbers bit for bit; on CUDA
    as far as :func:`sweeper.training.device.repeatable` says.
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
        forget_peak_memory(device)
        engine = Engine(config, dataset=dataset, device=device)
        self.parameters = engine.parameters()
        self.notes["precision"] = engine.precision.name
        self.notes["graph"] = engine.graph
        self.notes["standardize"] = "once" if engine.inputs.kept_standardized else "every batch"
        self._schedule = make_schedule(config.optimizer, config.train.epochs)
        self._engine: Engine | None = engine
        self._validation: Inputs | None = engine.part(dataset.val)
        self._epoch = 0
        self._best: _Best | None = None

    def epochs(self, *, interrupt: Interrupt | None = None) -> Generator[Measurement, None, None]:
        """See :meth:`Training.epochs`."""
        poll = _Poll(interrupt)
        try:
            while self._epoch < self.config.train.epochs:
                measurement = self._run_epoch(poll)
                yield measurement
                if not measurement.finite:
                    break
        except Interrupted:
            raise
        except BaseException:  # GeneratorExit too: the trial was given up
            if self._epoch < self.config.train.epochs:
                self.close()
            raise
        finally:
            if self._engine is not None:
                self._engine.drop_graph()

    def best_weights(self) -> dict[str, Tensor]:
        """See :meth:`Training.best_weights`."""
        return {name: value.cpu() for name, value in self._decided().weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Training.state_dict`."""
        engine, best = self._open()[0], self._best
        return {
            "epoch": self._epoch,
            "engine": engine.state(),
            "schedule": self._schedule.state_dict(),
            "best": None
            if best is None
            else {"epoch": best.epoch, "value": best.value, "weights": self.best_weights()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Training.load_state_dict`."""
        self._open()[0].restore(state["engine"])
        self._schedule.load_state_dict(state["schedule"])
        self._epoch = state["epoch"]
        best = state["best"]
        self._best = None
        if best is not None:
            weights = {name: value.to(self.device) for name, value in best["weights"].items()}
            self._best = _Best(epoch=best["epoch"], value=best["value"], weights=weights)

    def close(self) -> None:
        """See :meth:`Training.close`."""
        if self._engine is not None:
            self._engine.drop_graph()
        self._engine = self._validation = self._best = None

    def _tested(self) -> dict[str, float]:
        best, engine = self._decided(), self._open()[0]
        inputs = engine.part(self.dataset.test)
        last = at_best = engine.evaluate(inputs, _Poll(None))
        if best.epoch != self._epoch:
            weights = model_state(engine.model)
            engine.model.load_state_dict(best.weights)
            at_best = engine.evaluate(inputs, _Poll(None))
            engine.model.load_state_dict(weights)
        return {
            "test_loss": at_best.loss,
            "test_accuracy": at_best.accuracy,
            "test_loss_last": last.loss,
            "test_accuracy_last": last.accuracy,
            "best_epoch": float(best.epoch),
        }

    def _run_epoch(self, poll: _Poll) -> Measurement:
        engine, validation = self._open()
        epoch, lr = self._epoch + 1, self._schedule.lr
        trained = engine.train(epoch=epoch, lr=lr, before_batch=poll)
        statistics = layer_statistics(engine.model) if self.config.train.layer_statistics else {}
        validated = engine.evaluate(validation, poll)
        metrics = {
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "val_loss": validated.loss,
            "val_accuracy": validated.accuracy,
            "lr": lr,
            "seconds": trained.seconds,
            "val_seconds": validated.seconds,
            "samples_per_s": len(engine.inputs) / trained.seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
            **statistics,
        }
        measurement = Measurement(epoch=epoch, metrics=metrics)
        self._epoch = epoch
        self._schedule.step(metrics)
        if measurement.finite:
            self._remember(engine, metrics)
        return measurement

    def _remember(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Keep the weights if this epoch is the best."""
        best = self._best
        if not self._beats(metrics, best.value if best else None):
            return
        state, value = engine.model.state_dict(), metrics[self.objective[0]]
        if best is None:
            weights = {name: tensor.detach().clone() for name, tensor in state.items()}
            self._best = _Best(epoch=self._epoch, value=value, weights=weights)
            return
        best.epoch, best.value = self._epoch, value
        for name, tensor in state.items():
            best.weights[name].copy_(tensor)

    def _open(self) -> tuple[Engine, Inputs]:
        if self._engine is None or self._validation is None:
            raise TrainingClosedError
        return self._engine, self._validation

    def _decided(self) -> _Best:
        if self._engine is None:
            raise TrainingClosedError
        if self._best is None:
            raise TrialDivergedError(
                f"an epoch with a finite {self.objective[0]} is needed, but none of "
                f"{self._epoch} had one"
            )
        return self._best


class _Poll:
    """Raises Interrupted once ``interrupt`` says so."""

    def __init__(self, interrupt: Interrupt | None) -> None:
        self._interrupt = interrupt

    def __call__(self) -> None:
        if self._interrupt is not None and self._interrupt():
            raise Interrupted

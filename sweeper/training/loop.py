"""Training of a network: configuration and data in, one Measurement an epoch out."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from sweeper.config import TrialConfig
from sweeper.data import Dataset
from sweeper.measurement import Measurement
from sweeper.training.base import Interrupt, Interrupted, Poll, Training, TrainingClosedError
from sweeper.training.compiling import Compiling
from sweeper.training.device import forget_peak_memory
from sweeper.training.engine import Engine
from sweeper.training.inputs import Inputs
from sweeper.training.layers import layer_statistics
from sweeper.training.network import NetworkTrial
from sweeper.training.state import model_state
from sweeper.training.turns import Steps


class NetworkTraining(NetworkTrial, Training):
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
        compiling: Compiling | None = None,
    ) -> None:
        super().__init__(config, dataset=dataset, device=device, objective=objective)
        forget_peak_memory(device)
        engine = Engine(config, dataset=dataset, device=device, compiling=compiling)
        self.parameters = engine.parameters()
        self.notes["precision"] = engine.precision.name
        self.notes["graph"] = engine.graph
        self.notes["compile"] = engine.compiled
        self.notes["standardize"] = "once" if engine.inputs.kept_standardized else "every batch"
        self._engine: Engine | None = engine
        self._validation: Inputs | None = engine.part(dataset.val)

    def epochs(self, *, interrupt: Interrupt | None = None) -> Generator[Measurement, None, None]:
        """See :meth:`Training.epochs`."""
        poll = Poll(interrupt)
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

    @property
    def closed(self) -> bool:
        """Whether the model is gone."""
        return self._engine is None

    def close(self) -> None:
        """See :meth:`Trial.close`."""
        if self._engine is not None:
            self._engine.drop_graph()
        self._engine = self._validation = None
        self._forget_best()

    def _engine_state(self) -> dict[str, Any]:
        return self._open()[0].state()

    def _restore_engine(self, state: Mapping[str, Any]) -> None:
        self._open()[0].restore(state)

    def _weights(self) -> Mapping[str, Tensor]:
        return self._open()[0].model.state_dict()

    def _tested(self) -> dict[str, float]:
        best, engine = self._decided(), self._open()[0]
        inputs = engine.part(self.dataset.test)
        last = at_best = engine.evaluate(inputs, Poll(None))
        if best.epoch != self._epoch:
            weights = model_state(engine.model)
            engine.model.load_state_dict(best.weights)
            at_best = engine.evaluate(inputs, Poll(None))
            engine.model.load_state_dict(weights)
        return self._final(last=last, at_best=at_best)

    def _run_epoch(self, poll: Poll) -> Measurement:
        engine, validation = self._open()
        trained = engine.train(epoch=self._epoch + 1, lr=self._schedule.lr, before_batch=poll)
        return self._concluded(trained, engine.evaluate(validation, poll), self._statistics(engine))

    def steps(self) -> Steps[Measurement]:
        """One epoch with pauses, for several trials in turn (`sweeper.training.crew`).

        To close it before its end, and whatever is raised in it, puts the trial back to where it
        was. Draws from torch's default generator, which it seeds.
        """
        engine, validation = self._open()
        before = engine.state(self.device)
        try:
            trained = yield from engine.training(epoch=self._epoch + 1, lr=self._schedule.lr)
            validated = yield from engine.evaluation(validation)
            measurement = self._concluded(trained, validated, self._statistics(engine))
        except BaseException:
            engine.restore(before)
            raise
        return measurement

    def _statistics(self, engine: Engine) -> dict[str, float]:
        return layer_statistics(engine.model) if self.config.train.layer_statistics else {}

    def _open(self) -> tuple[Engine, Inputs]:
        if self._engine is None or self._validation is None:
            raise TrainingClosedError
        return self._engine, self._validation

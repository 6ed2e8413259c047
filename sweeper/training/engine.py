"""A model on its device with everything that trains it, one epoch at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sweeper.config import TrialConfig
from sweeper.data import Dataset, Part
from sweeper.errors import UsageError
from sweeper.models import build
from sweeper.optim import make_loss
from sweeper.training.capture import CapturedStep
from sweeper.training.compiling import Compiling
from sweeper.training.device import noise, noise_generator, repeatable, stream
from sweeper.training.evaluation import evaluate, evaluation_batch
from sweeper.training.inputs import Inputs, Order
from sweeper.training.network import Pass
from sweeper.training.precision import precision_of
from sweeper.training.ready import ReadyStep
from sweeper.training.state import model_state
from sweeper.training.step import Step, Totals
from sweeper.training.turns import Steps, driven, settled
from sweeper.training.update import make_update

_CONVOLUTIONAL = frozenset({"cnn", "resnet18", "timm"})
"""Families whose images and kernels are kept channels-last, as convolutions like it: cuDNN's, and
on a CPU oneDNN's."""
_CPU = torch.device("cpu")


class Engine:
    """The model of ``config``, its optimizer and its training images on ``device``.

    ``graph`` says whether the step is a CUDA graph, ``compiled`` whether it went through
    ``torch.compile``, or why not. Without ``compiling`` there is nothing that ``train.compile:
    auto`` could go by, and it compiles nothing.

    Raises UsageError for ``train.graph: on`` without CUDA, CaptureError where it is on and cannot
    be done; for ``train.compile: on`` UsageError where the model cannot be compiled, and
    MissingExtraError where a program for that is missing.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        dataset: Dataset,
        device: torch.device,
        compiling: Compiling | None = None,
    ) -> None:
        train = config.train
        if train.graph == "on" and device.type != "cuda":
            raise UsageError(
                "train.graph: on needs a CUDA device, but this trial runs on the CPU; "
                "use auto or off"
            )
        self._config = config
        self._dataset = dataset
        self._device = device
        self.precision = precision_of(train, device)
        self._memory_format = (
            torch.channels_last if config.model.name in _CONVOLUTIONAL else torch.contiguous_format
        )
        self._evaluation_batch = evaluation_batch(config.model, dataset.shape, device)
        self._step = self._assembled()
        self.model = self._step.model
        self.inputs = self._step.inputs
        self._order = Order(len(self.inputs), batch_size=train.batch_size, device=device)
        self._ready = ReadyStep(
            config,
            step=self._step,
            order=self._order,
            device=device,
            state=self.state,
            restore=self.restore,
        )
        self._ready.capture()
        self.compiled = self._ready.compile_if_worth(dataset.shape, compiling)
        self.graph = self._ready.captured

    @property
    def _graph(self) -> CapturedStep | None:
        return self._ready.graph

    def parameters(self) -> int:
        """How many numbers are trained."""
        trained = (each for each in self.model.parameters() if each.requires_grad)
        return sum(parameter.numel() for parameter in trained)

    def part(self, part: Part, *, augmented: bool = False) -> Inputs:
        """``part`` of the data set as this model takes it."""
        return Inputs(
            part,
            dataset=self._dataset,
            precision=self.precision,
            augmented=augmented,
            memory_format=self._memory_format,
        )

    def train(self, *, epoch: int, lr: float, before_batch: Callable[[], None]) -> Pass:
        """Train on every image once. ``before_batch`` may raise to end early."""
        seed = stream(self._config.train.seed, "noise", epoch)
        with repeatable(self._device), noise(self._device, seed):
            return driven(self.training(epoch=epoch, lr=lr), before_batch)

    def training(self, *, epoch: int, lr: float) -> Steps[Pass]:
        """As :meth:`train`, with pauses. Draws from torch's default generator, which it seeds."""
        seed, step = self._config.train.seed, self._step
        step.update.begin(lr)
        self._order.shuffle(stream(seed, "order", epoch))
        noise_generator(self._device).manual_seed(stream(seed, "noise", epoch))
        step.totals.clear()
        step.model.train()
        yield from settled(self._device)
        started = time.perf_counter()
        yield from self._all_batches()
        yield from settled(self._device)
        seconds = time.perf_counter() - started
        ((loss, accuracy),) = step.totals.means(len(self.inputs))
        return Pass(loss=loss, accuracy=accuracy, seconds=seconds)

    def _all_batches(self) -> Steps[None]:
        step, graph = self._step, self._graph
        for index_B in self._order.batches():
            yield None
            if graph is None:
                step.full(index_B)
            else:
                graph.replay()
        if self._order.tail:
            yield None
            step.partial(self._order.rest())

    def evaluate(self, inputs: Inputs, before_batch: Callable[[], None]) -> Pass:
        """Loss and accuracy on ``inputs``, with the weights as they are."""
        with repeatable(self._device):
            return driven(self.evaluation(inputs), before_batch)

    def evaluation(self, inputs: Inputs) -> Steps[Pass]:
        """As :meth:`evaluate`, with pauses."""
        started = time.perf_counter()
        loss, accuracy = yield from evaluate(
            self.model,
            inputs,
            loss=self._step.loss,
            precision=self.precision,
            batch=self._evaluation_batch,
        )
        return Pass(loss=loss, accuracy=accuracy, seconds=time.perf_counter() - started)

    def state(self, device: torch.device = _CPU) -> dict[str, Any]:
        """Model, optimizer and loss scaling, as `sweeper.training.state` describes it.

        ``device``: where the copies are kept.
        """
        return {"model": model_state(self.model, device), **self._step.update.state(device)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put :meth:`state` back, in place."""
        self.model.load_state_dict(state["model"])
        self._step.update.restore(state)

    def drop_graph(self) -> None:
        """Free the CUDA graph; training goes on eagerly."""
        self._ready.close()

    def _assembled(self) -> Step:
        config, train = self._config, self._config.train
        model = build(config.model, self._dataset.shape, seed=train.seed)
        model.to(device=self._device, dtype=self.precision.dtype)
        model.to(memory_format=self._memory_format)
        update = make_update(
            model, config, precision=self.precision, memory_format=self._memory_format
        )
        return Step(
            model=model,
            update=update,
            loss=make_loss(train, self._dataset.shape.classes),
            inputs=self.part(self._dataset.train, augmented=True),
            precision=self.precision,
            totals=Totals(self._device),
        )

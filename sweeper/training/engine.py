"""A model on its device with everything that trains it, one epoch at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sweeper.config import TrialConfig
from sweeper.data import Dataset, Part
from sweeper.errors import UsageError
from sweeper.models import build
from sweeper.optim import make_loss, make_optimizer, set_lr
from sweeper.training.capture import CapturedStep, CaptureError
from sweeper.training.device import noise, noise_generator, repeatable, stream
from sweeper.training.evaluation import evaluate, evaluation_batch
from sweeper.training.inputs import Inputs, Order
from sweeper.training.network import Pass
from sweeper.training.precision import precision_of
from sweeper.training.state import model_state, optimizer_state, restore_optimizer
from sweeper.training.step import Step, Totals
from sweeper.training.turns import Steps, driven, settled

_CONVOLUTIONAL = frozenset({"cnn", "resnet18", "timm"})
"""Families whose images and kernels are kept channels-last on CUDA, as its convolutions like it."""
_CPU = torch.device("cpu")


class Engine:
    """The model of ``config``, its optimizer and its training images on ``device``.

    ``graph`` says whether the step is a CUDA graph: ``captured``, or why not. Raises UsageError
    for ``train.graph: on`` without CUDA, CaptureError where it is on and cannot be done.
    """

    def __init__(self, config: TrialConfig, *, dataset: Dataset, device: torch.device) -> None:
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
            torch.channels_last
            if device.type == "cuda" and config.model.name in _CONVOLUTIONAL
            else torch.contiguous_format
        )
        self._evaluation_batch = evaluation_batch(config.model, dataset.shape, device)
        self._step = self._assembled()
        self.model = self._step.model
        self.inputs = self._step.inputs
        self._order = Order(len(self.inputs), batch_size=train.batch_size, device=device)
        self._graph: CapturedStep | None = None
        self.graph = self._made_ready()

    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self._step.parameters)

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
        set_lr(step.optimizer, lr)
        self._order.shuffle(stream(seed, "order", epoch))
        noise_generator(self._device).manual_seed(stream(seed, "noise", epoch))
        step.totals.clear()
        step.model.train()
        yield from settled(self._device)
        started = time.perf_counter()
        yield from self._all_batches()
        yield from settled(self._device)
        seconds = time.perf_counter() - started
        loss, accuracy = step.totals.means(len(self.inputs))
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
        scaler = self._step.scaler
        return {
            "model": model_state(self.model, device),
            "optimizer": optimizer_state(self._step.optimizer, device),
            "scaler": scaler.state_dict() if scaler is not None else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put :meth:`state` back, in place."""
        self.model.load_state_dict(state["model"])
        restore_optimizer(self._step.optimizer, state["optimizer"])
        if self._step.scaler is not None:
            self._step.scaler.load_state_dict(state["scaler"])

    def drop_graph(self) -> None:
        """Free the CUDA graph; training goes on eagerly."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _assembled(self) -> Step:
        config, train = self._config, self._config.train
        model = build(config.model, self._dataset.shape, seed=train.seed)
        model.to(device=self._device, dtype=self.precision.dtype)
        model.to(memory_format=self._memory_format)
        compiled: Callable[[Tensor], Tensor] = model
        if train.compile == "on":
            compiled = torch.compile(model)
        optimizer = make_optimizer(
            config.optimizer,
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            capturable=self._device.type == "cuda" and train.graph != "off",
        )
        return Step(
            model=model,
            compiled=compiled,
            optimizer=optimizer,
            loss=make_loss(train, self._dataset.shape.classes),
            inputs=self.part(self._dataset.train, augmented=True),
            precision=self.precision,
            clip_norm=config.optimizer.clip_norm,
            totals=Totals(self._device),
        )

    def _made_ready(self) -> str:
        """Make the step a CUDA graph if that is wanted and works; what came of it.

        Compiling happens here too, so that no epoch's time contains it.
        """
        train, reason = self._config.train, self._eager_because()
        if reason is not None and train.graph == "on":
            raise CaptureError(f"train.graph: on cannot be done: {reason}")
        if reason is not None and train.compile != "on":
            return f"not used: {reason}"
        step, order, before = self._step, self._order, self.state()

        def run() -> None:
            step.full(order.following())

        def undo() -> None:
            step.forget_gradients()
            self.restore(before)
            step.totals.clear()
            order.rewind()

        set_lr(step.optimizer, self._config.optimizer.lr)
        self.model.train()
        with repeatable(self._device), noise(self._device, 0):
            if reason is None:
                try:
                    self._graph = CapturedStep(run, undo=undo, device=self._device)
                    return "captured"
                except CaptureError as error:
                    if train.graph == "on":
                        raise
                    reason = str(error)
            if order.full:
                run()
                undo()
        return f"not used: {reason}"

    def _eager_because(self) -> str | None:
        """Why a capture need not be tried."""
        if self._device.type != "cuda":
            return "a CUDA graph needs a CUDA device"
        if self._config.train.graph == "off":
            return "train.graph is off"
        if not self._order.full:
            return "the training images do not fill one batch"
        optimizer_skips = getattr(self._step.optimizer, "_step_supports_amp_scaling", False)
        if self._step.scaler is not None and not optimizer_skips:
            return "loss scaling for float16 waits for the device, unless the optimizer is fused"
        return None

"""The training step made as fast as the configuration asks: captured, compiled, or as it is.

All of this happens before the first epoch, so that no epoch's time contains it, and by steps that
leave no trace in the model, the optimizer and the random numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from sweeper.config import DataShape, TrialConfig
from sweeper.training.capture import CapturedStep, CaptureError
from sweeper.training.compiling import (
    CompileError,
    Compiling,
    compiled,
    decide,
    lacking,
    of_its_own,
    program,
    ready,
    refused,
    required,
)
from sweeper.training.device import noise, repeatable, synchronize
from sweeper.training.inputs import Order
from sweeper.training.step import Measure, Step

_TIMED_STEPS: Final = {"cpu": 3, "cuda": 20}
_LONG_ENOUGH_S: Final = 0.5
"""Steps that took so long together are enough to go by."""


def fastest(run: Callable[[], None], back: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step, the fastest of a few after one that warms up; ``back`` undoes each."""
    found: list[float] = []
    _timed(run, back, device)
    while len(found) < _TIMED_STEPS[device.type] and sum(found) < _LONG_ENOUGH_S:
        found.append(_timed(run, back, device))
    return min(found)


def _timed(run: Callable[[], None], back: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step. One thread on a CPU counts its own time, whoever else computes."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    synchronize(device)
    began = clock()
    run()
    synchronize(device)
    seconds = clock() - began
    back()
    return seconds


class ReadyStep:
    """``step`` on the full batches of ``order``.

    ``graph`` is the captured step, None where every step is launched by itself; ``captured`` says
    so in words. ``state`` and ``restore`` read and write, in place, what a step changes.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        step: Step,
        order: Order,
        device: torch.device,
        state: Callable[[], Mapping[str, Any]],
        restore: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._config = config
        self._step = step
        self._order = order
        self._device = device
        self._state, self._restore = state, restore
        self._compiled: Measure | None = None
        self._code: Path | None = None
        self._before: Mapping[str, Any] = {}
        self.graph: CapturedStep | None = None
        self.captured = "not used"

    def capture(self) -> None:
        """Make the step a CUDA graph if that is wanted and works.

        Raises CaptureError where ``train.graph: on`` cannot be done.
        """
        train, reason = self._config.train, self._eager_because()
        if reason is not None and train.graph == "on":
            raise CaptureError(f"train.graph: on cannot be done: {reason}")
        if reason is None:
            try:
                with self._rehearsal() as undo:
                    self.graph = CapturedStep(self._run, undo=undo, device=self._device)
            except CaptureError as error:
                if train.graph == "on":
                    raise
                reason = str(error)
        self.captured = "captured" if reason is None else f"not used: {reason}"

    def compile_if_worth(self, shape: DataShape, how: Compiling | None) -> str:
        """Compile the step if that is wanted, works and repays; what came of it.

        Raises MissingExtraError where ``train.compile: on`` lacks a program, UsageError where the
        model cannot be compiled.
        """
        train = self._config.train
        self._code = how.code if how is not None else None
        if train.compile == "off":
            return "not used: train.compile is off"
        if not self._order.full:
            return "not used: the training images do not fill one batch"
        if train.compile == "on":
            required(self._device)
            try:
                return f"compiled in {self.compile():.1f} s"
            except CompileError as error:
                raise refused(error) from error
        if how is None:
            return "not used: there is no home folder that knows whether it repays"
        if reason := lacking(self._device):
            return f"not used: {reason}"
        key = program(self._config, shape, self._device)
        steps = self._order.full * train.epochs
        return decide(self, key=key, steps=steps, how=how, device_type=self._device.type)

    def compile(self) -> float:
        """See :meth:`sweeper.training.compiling.Rehearsed.compile`."""
        began = time.perf_counter()
        self.close()
        if self._compiled is None:
            try:
                with ready(self._code), self._rehearsal() as undo:
                    measured = of_its_own(self._step.measured, type(self._step.model))
                    self._compiled = self._step.measure = compiled(measured, self._device)
                    try:
                        self._run()  # compiles both passes
                    finally:
                        undo()
            except BaseException:
                self._compiled = None
                self.plain()
                raise
        self._step.measure = self._compiled
        self.capture()
        synchronize(self._device)
        return time.perf_counter() - began

    def plain(self) -> None:
        """See :meth:`sweeper.training.compiling.Rehearsed.plain`."""
        self.close()
        self._step.measure = self._step.measured
        self.capture()

    def step_s(self) -> float:
        """See :meth:`sweeper.training.compiling.Rehearsed.step_s`: the fastest of a few."""
        with self._rehearsal() as undo:
            run = self.graph.replay if self.graph is not None else self._run
            # A graph's gradients stay: an epoch of replays alone would leave none to look at.
            back = self._put_back if self.graph is not None else undo
            return fastest(run, back, self._device)

    def close(self) -> None:
        """Free the CUDA graph; steps are launched one by one then."""
        if self.graph is not None:
            self.graph.close()
            self.graph = None

    def _run(self) -> None:
        self._step.full(self._order.following())

    @contextlib.contextmanager
    def _rehearsal(self) -> Iterator[Callable[[], None]]:
        """Train in here; the function yielded puts everything back, gradients included."""
        self._before = self._state()

        def undo() -> None:
            self._step.update.forget_gradients()
            self._put_back()

        self._step.update.begin(self._config.optimizer.lr)
        self._step.model.train()
        with repeatable(self._device), noise(self._device, 0):
            yield undo

    def _put_back(self) -> None:
        self._restore(self._before)
        self._step.totals.clear()
        self._order.rewind()

    def _eager_because(self) -> str | None:
        """Why a capture need not be tried."""
        if self._device.type != "cuda":
            return "a CUDA graph needs a CUDA device"
        if self._config.train.graph == "off":
            return "train.graph is off"
        if not self._order.full:
            return "the training images do not fill one batch"
        return self._step.update.why_eager()

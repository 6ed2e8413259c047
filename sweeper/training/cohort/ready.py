"""The common step of a cohort made as fast as the configuration asks: captured, compiled, or as it
is.

All of this happens before an epoch begins, so that no epoch's time contains it, and by steps that
leave no trace in the numbers of the members.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from sweeper.config import DataShape, TrialConfig
from sweeper.training.capture import CapturedStep, CaptureError
from sweeper.training.compiling import (
    CompileError,
    Compiling,
    NoRoomError,
    compiled,
    decide,
    lacking,
    program,
    ready,
    refused,
    required,
)
from sweeper.training.device import synchronize
from sweeper.training.ready import fastest

_log = logging.getLogger(__name__)
Losses = Callable[..., tuple[Tensor, Tensor]]
_NO_MEMORY: Final = "there is not enough memory to compile it for so many trials"


@dataclass(frozen=True, kw_only=True)
class Built:
    """What is built into a step: where it changes, the step is compiled, or captured, anew.

    ``dropping``: the layers that drop something in any member; ``smooths``: whether any member
    smooths its labels. ``captured``: all that a graph depends on and compiled code does not.
    """

    slots: int
    dropping: frozenset[str]
    smooths: bool
    captured: Hashable
    generators: Sequence[torch.Generator]

    @property
    def code(self) -> Hashable:
        """All that compiled code depends on."""
        return self.slots, self.dropping, self.smooths


class ReadyCohort:
    """``step`` on the next full batch of a cohort, of ``full`` batches an epoch.

    ``losses`` is what compiling makes faster, both passes of it; the step calls what :attr:`losses`
    is at the moment. ``undo`` puts back everything that a step changes, in place.

    ``graph`` is the captured step, None where every step is launched by itself. ``captured`` and
    ``compiled`` say in words whether it is, or why not. Without ``how`` there is nothing that
    ``train.compile: auto`` could go by, and it compiles nothing.

    Raises MissingExtraError where ``train.compile: on`` lacks a program.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        shape: DataShape,
        device: torch.device,
        full: int,
        step: Callable[[], None],
        losses: Losses,
        undo: Callable[[], None],
        how: Compiling | None,
    ) -> None:
        if config.train.compile == "on":
            required(device)
        self._config = config
        self._shape = shape
        self._device = device
        self._full = full
        self._step, self._eager, self._undo = step, losses, undo
        self._how = how
        self._built: Built
        self._made: dict[Hashable, Losses] = {}
        self._code: Hashable = None
        self._slots = 0
        self._most = 0
        self._captured: Hashable = None
        self.losses: Losses = losses
        self.compiled = "not used: train.compile is off"
        self.graph: CapturedStep | None = None
        self.captured = "not used: a CUDA graph needs a CUDA device"

    @property
    def is_compiled(self) -> bool:
        """Whether the step runs compiled."""
        return self.losses is not self._eager

    def prepare(self, built: Built) -> None:
        """Make the step ready for an epoch with what is built into it now.

        Raises CaptureError where ``train.graph: on``, UsageError where ``train.compile: on`` cannot
        be done.
        """
        self._built = built
        if not self._full:
            self.captured = self.compiled = "not used: the training images do not fill one batch"
            return
        other = self._code != built.code
        if other:
            self._forget_code(built.slots)
        if other and self._config.train.compile == "on":
            try:
                self.compiled = f"compiled in {self._compile():.1f} s"
            except CompileError as error:
                raise refused(error) from error
        self._capture()
        if other and self._config.train.compile == "auto":
            self.compiled = self._decided()
        if other and self._config.train.compile != "off":
            _log.info("torch.compile for a batch of %d trials: %s", built.slots, self.compiled)
        self._code = built.code

    def compile(self) -> float:
        """See :meth:`sweeper.training.compiling.Rehearsed.compile`."""
        began = time.perf_counter()
        with self._plain_where_it_fails():
            self._compile()
        self._capture()
        synchronize(self._device)
        return time.perf_counter() - began

    def plain(self) -> None:
        """See :meth:`sweeper.training.compiling.Rehearsed.plain`."""
        self.drop_graph()
        self.losses = self._eager
        self._capture()

    def step_s(self) -> float:
        """See :meth:`sweeper.training.compiling.Rehearsed.step_s`: the fastest of a few."""
        run = self.graph.replay if self.graph is not None else self._step
        with self._plain_where_it_fails() if self.is_compiled else contextlib.nullcontext():
            return fastest(run, self._undo, self._device)

    def drop_graph(self) -> None:
        """Free the CUDA graph; the next epoch captures a new one."""
        if self.graph is not None:
            self.graph.close()
        self.graph = self._captured = None

    def drop_compiled(self) -> None:
        """Forget what was compiled: the slots need not stay as many any more."""
        self.drop_graph()
        self._made.clear()
        self._code, self._most = None, 0
        self.losses = self._eager

    def _forget_code(self, slots: int) -> None:
        """Run plain again; code for another number of slots is never needed any more."""
        self.drop_graph()
        if slots != self._slots:
            self._made.clear()
        self._slots = slots
        self._code = None
        self.losses = self._eager

    @contextlib.contextmanager
    def _plain_where_it_fails(self) -> Iterator[None]:
        """Run plain after an error. Raises NoRoomError for memory that does not suffice."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._undo()
            self.plain()
            raise NoRoomError(_NO_MEMORY) from error
        except BaseException:
            self.plain()
            raise

    def _decided(self) -> str:
        """Compile where that repays (``train.compile: auto``); what came of it."""
        slots, how = self._built.slots, self._how
        if how is None:
            return "not used: there is no home folder that knows whether it repays"
        if reason := lacking(self._device):
            return f"not used: {reason}"
        if slots < self._most:
            return "not used: there were more trials in the batch before, and few are to come"
        self._most = slots
        return decide(
            self,
            key=self._key(),
            steps=self._full * self._config.train.epochs,
            how=replace(how, repeats=max(1, how.together // slots)),
            device_type=self._device.type,
        )

    def _key(self) -> str:
        """What two cohorts share that run the same compiled code, the loss included."""
        built = self._built
        smooth = ", smoothed" if built.smooths else ""
        return f"{built.slots} x {program(self._typical(), self._shape, self._device)}{smooth}"

    def _typical(self) -> TrialConfig:
        """The configuration that stands for all members: their rates are no code."""
        model = self._config.model
        if hasattr(model, "dropout"):
            rate = 0.5 if self._built.dropping else 0.0
            model = model.model_copy(update={"dropout": rate})
        train = self._config.train.model_copy(update={"label_smoothing": 0.0})
        return self._config.model_copy(update={"model": model, "train": train})

    def _compile(self) -> float:
        """Let the step run compiled; the seconds that took. Raises CompileError."""
        began = time.perf_counter()
        self.drop_graph()
        made = self._made.get(self._built.code)
        if made is None:
            try:
                with ready(self._how.code if self._how is not None else None):
                    made = self.losses = compiled(self._eager, self._device)
                    self._step()
            except BaseException:
                self.losses = self._eager
                raise
            finally:
                self._undo()
            self._made[self._built.code] = made
        self.losses = made
        return time.perf_counter() - began

    def _capture(self) -> None:
        """Make the step a CUDA graph where that is wanted, works, and is not done yet.

        Rates of dropout are built into it, and which rules the optimizer has: a refill that brings
        others is captured anew, one that brings only other numbers is not.
        """
        wanted = self._config.train.graph
        if self._device.type != "cuda":
            return
        if wanted == "off":
            self.captured = "not used: train.graph is off"
            return
        if self._captured == self._built.captured:
            return
        self.drop_graph()
        self._captured = self._built.captured
        try:
            self.graph = CapturedStep(
                self._step,
                undo=self._undo,
                device=self._device,
                generators=self._built.generators,
            )
            self.captured = "captured"
        except CaptureError as error:
            if wanted == "on":
                raise
            self.captured = f"not used: {error}"

"""Training that can pause: before every batch, and where the host has to wait for the device.

A generator of :data:`Steps` trains or evaluates, and pauses between two batches with None, or with
what it waits for. Whoever trains one thing drives it to its end (:func:`driven`); several are
driven in turn by `sweeper.training.lanes`. So nothing of torch's state that all share (its default
generator, cuDNN's settings, the current stream) may be changed across a pause: whoever drives sets
it for the time of a turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Awaited(Protocol):
    """Something on the device that will be done, as a ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether it is done."""

    def synchronize(self) -> None:
        """Wait until it is done."""


Steps = Generator[Awaited | None, None, T]


def driven(steps: Steps[T], before_batch: Callable[[], None]) -> T:
    """Drive ``steps`` to their end, and what they return.

    ``before_batch`` is called at every pause but those that wait, and may raise to end early.
    """
    with contextlib.closing(steps):
        while True:
            try:
                awaited = next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            if awaited is None:
                before_batch()
            else:
                awaited.synchronize()


def settled(device: torch.device) -> Steps[None]:
    """Pauses until the device has done what is queued on the current stream; no pause on a CPU."""
    if device.type != "cuda":
        return
    done: Awaited = torch.cuda.current_stream(device).record_event()
    while not done.query():
        yield done

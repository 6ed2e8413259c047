"""Lanes: things that train side by side, in turn on one thread, each on a CUDA stream of its own.

A turn queues a few batches (one replay of a captured step takes microseconds to queue) and
returns, so one thread keeps many streams busy; threads would fight for the interpreter, and no two
graphs may be captured at once. Nobody waits for another one: a lane whose stream has enough to do,
or whose epoch is over for the host but not for the device, is passed over. On a CPU there are no
streams, and the same turns train one batch after the other.

What keeps streams apart and yet in order (torch's notes on CUDA semantics, "CUDA streams"):

- Between two runs of its steps a lane's stream is idle, and the host knows (:meth:`Lane.turn` and
  :meth:`Lane.stop` wait for it, for it alone). Everything may be done to its model on the default
  stream then: a checkpoint read or written, the test set, an end. A run begins by waiting for the
  default stream, where the data set was made as well.
- Memory belongs to the stream it was allocated on, and is given to others in the order of that
  stream. So what a lane trains is built in :meth:`Lane.entered`, and freed while the lane is idle;
  then nothing has to be recorded with ``record_stream``.
- A step is captured on the lane's own stream (`sweeper.training.capture` says why), after a wait
  for the whole device, which ``torch.cuda.graph`` does by itself.
- Random numbers come from a generator of the lane (`sweeper.training.device.own_noise`).

On a CPU it is all the same but for streams and graphs.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, TypeVar

import torch

from sweeper.training.device import own_noise, repeatable
from sweeper.training.turns import Awaited, Steps

T = TypeVar("T")

_BATCHES_A_TURN: Final = {"cpu": 1, "cuda": 8}
"""A replay of a small model's step is queued faster than the stream and the generator are changed,
so a turn on a GPU queues several."""
_AHEAD: Final = 16
"""So many turns may be queued on a stream. More would fill the driver's queue, where the next
launch waits, and with it everybody; fewer would run dry while the worker reports an epoch."""
_NAP_S: Final = 2e-5


class Lane(Generic[T]):
    """One stream with its random numbers, and the steps that run on it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # no types there
        self._generator = torch.Generator(device=device)
        self._queued: deque[Awaited] = deque()
        self._awaited: Awaited | None = None
        self._steps: Steps[T] | None = None
        self._ended: tuple[T | None, BaseException | None] = (None, None)

    @property
    def running(self) -> bool:
        """Whether there are steps that are not at their end."""
        return self._steps is not None

    @property
    def ready(self) -> bool:
        """Whether the next turn would not have to wait for the device."""
        while self._queued and self._queued[0].query():
            self._queued.popleft()
        if self._awaited is not None and not self._awaited.query():
            return False
        return len(self._queued) < _AHEAD

    def begin(self, steps: Steps[T]) -> None:
        """Let the coming turns be those of ``steps``."""
        self._after_default()
        self._steps = steps

    def turn(self) -> bool:
        """Train on the next batch or batches. True: the steps are at their end, see
        :meth:`result`."""
        steps, ended = self._steps, False
        if steps is None:
            return True
        try:
            with self._own():
                try:
                    self._advance(steps)
                except StopIteration as end:
                    self._ended, ended = (end.value, None), True
                else:
                    self._mark()
        except Exception as error:  # noqa: BLE001 - result() raises it
            self._ended, ended = (None, error), True
        if ended:
            self._idle()
        return ended

    def _advance(self, steps: Steps[T]) -> None:
        for _ in range(_BATCHES_A_TURN.get(self._device.type, 1)):
            self._awaited = next(steps)
            if self._awaited is not None:
                return

    def result(self) -> T:
        """What the last steps returned; raises what they raised."""
        result, error = self._ended
        self._ended = (None, None)
        if error is not None:
            raise error
        return result  # type: ignore[return-value] # set where nothing was raised

    def stop(self) -> None:
        """Close steps that are not at their end, which puts back what they changed."""
        if self._steps is not None:
            with self._own():
                self._steps.close()
            self._idle()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Build here what the lane is to train. Waits for what the lane has queued."""
        self._after_default()
        try:
            with self._own():
                yield
        finally:
            self._wait()

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        """The lane's stream is the current one, and its generator the default one."""
        on_stream = torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()
        with on_stream, own_noise(self._generator):
            yield

    def _after_default(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def _mark(self) -> None:
        if self._stream is not None:
            self._queued.append(self._stream.record_event())

    def _idle(self) -> None:
        self._steps = self._awaited = None
        self._queued.clear()
        self._wait()

    def _wait(self) -> None:
        if self._stream is not None:
            # An error of CUDA is raised here once more; whoever asks for the result learns of it.
            with contextlib.suppress(RuntimeError):
                self._stream.synchronize()


def first_done(lanes: deque[Lane[T]], before_turn: Callable[[], None]) -> Lane[T]:
    """Give running lanes their turns until one is at its end; that one, and it is taken out.

    The order is kept from call to call, so that nobody is favoured. ``before_turn`` may raise to
    end early; the lanes are then as they were.
    """
    while True:
        waiting = True
        for _ in range(len(lanes)):
            before_turn()
            lanes.rotate(-1)
            lane = lanes[-1]
            if lane.ready:
                waiting = False
                if lane.turn():
                    lanes.pop()
                    return lane
        if waiting:
            time.sleep(_NAP_S)


def all_done(lanes: Sequence[Lane[T]], before_turn: Callable[[], None]) -> list[T]:
    """Give running lanes their turns until all are at their ends, and their results."""
    running = deque(lanes)
    with repeatable(lanes[0]._device):
        while running:
            first_done(running, before_turn)
    return [lane.result() for lane in lanes]

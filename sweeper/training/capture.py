"""The whole training step as one CUDA graph.

A small model spends its time on launching kernels: 5 to 8 µs each, 100 to 300 of them a step. A
graph launches all of them at once. What torch asks for (notes on CUDA semantics, "CUDA Graphs"):

- Everything that a replay reads or writes keeps its address: parameters, buffers and optimizer
  state do anyway; the learning rate is a tensor; the batch's positions come from a permutation and
  a counter that live on the device (`sweeper.training.inputs.Order`).
- The capture begins without gradients, so the backward pass allocates them in the graph's own
  memory and a replay overwrites them instead of adding to them. An eager step in between (the
  last, smaller batch of an epoch) may replace ``.grad`` by gradients of its own.
- Some steps run before, on the stream that captures, so that nothing is initialized lazily during
  the capture. Here they leave no trace: `sweeper.training.state` puts everything back.
- The host must not wait for the device. The last of these steps runs with torch's check for that,
  so that a model that does is found before the capture, which could not be undone as cleanly.
- Random kernels read torch's default generator, which every capture knows, or generators that the
  graph was told of. A replay advances them as eager steps would, and they may be seeded between
  replays. A graph keeps the generator's state that was the default one's when it was captured
  (`sweeper.training.device.own_noise`).
- Every graph has a memory pool of its own. Torch lets graphs share one only where they are replayed
  one after the other, and those of several trials are replayed side by side.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from sweeper.errors import UsageError
from sweeper.training.device import noise_generator


class CaptureError(UsageError):
    """The training step cannot be captured as a CUDA graph."""


class CapturedStep:
    """``step`` as a CUDA graph on ``device``.

    ``step`` is run some times and captured. ``generators`` are those it draws from beside the
    device's default one. ``undo`` puts back everything that a step changes, in
    place, and frees the gradients; nothing is left of the steps afterwards. Raises CaptureError
    with the reason where the step cannot be captured; training may then go on eagerly.
    """

    def __init__(
        self,
        step: Callable[[], None],
        *,
        undo: Callable[[], None],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = torch.cuda.graph_pool_handle()
        self._begun = False
        for generator in generators:
            self._graph.register_generator_state(generator)
        current = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device):
                self._capture(step, undo)
        except RuntimeError as error:  # torch's CUDA errors, out of memory included, derive from it
            torch.cuda.set_stream(current)  # which a capture that fails does not put back
            torch.cuda.synchronize(device)
            if self._begun:
                self._leave_capture(device, generators)
            undo()
            raise CaptureError(
                f"the training step cannot be captured: {_first_reason(error)}"
            ) from error

    def _capture(self, step: Callable[[], None], undo: Callable[[], None]) -> None:
        # Where the caller is on a stream of its own, the capture is on that one, not on torch's one
        # for all captures: cuBLAS has one workspace a stream, a graph keeps the address of the one
        # it was captured with, and replays side by side would write into the same one.
        current = torch.cuda.current_stream()
        own = None if current == torch.cuda.default_stream() else current
        # thread_local: other threads (heartbeat, tracker) stay free to do as they like.
        capturing = torch.cuda.graph(
            self._graph, pool=self._pool, stream=own, capture_error_mode="thread_local"
        )
        stream = capturing.capture_stream
        if stream is None:
            raise CaptureError("torch has no stream to capture on")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for last in (False, False, True):
                try:
                    with _waiting_forbidden() if last else contextlib.nullcontext():
                        step()
                finally:
                    undo()
        torch.cuda.current_stream().wait_stream(stream)
        # A collected cycle could free CUDA memory or another graph in the middle of a capture.
        self._begun = True
        with _no_garbage_collection(), capturing:
            step()

    def _leave_capture(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        """Tell torch that there is no capture any more.

        Until 2.11 it does not notice where a capture cannot even be ended: ``empty_cache`` would
        fail from then on, and generators would refuse to draw.
        """
        with contextlib.suppress(RuntimeError):  # it has noticed
            torch._C._cuda_endAllocateToPool(device.index, self._pool)
        for generator in (noise_generator(device), *generators):
            generator.graphsafe_set_state(generator.clone_state())

    def replay(self) -> None:
        """Queue one step; returns at once."""
        self._graph.replay()

    def close(self) -> None:
        """Free the graph and its memory. Waits for the device."""
        torch.cuda.synchronize()
        self._graph.reset()


def _first_reason(error: BaseException) -> str:
    """The first line of what went wrong first: ending a broken capture raises once more."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Let every operation that waits for the device raise RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

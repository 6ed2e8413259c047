"""The device a trial runs on: which, how much memory it took, and its random numbers.

Every random number of a trial comes from ``train.seed``, through :func:`stream`: one stream a
purpose and an epoch. So an epoch can be repeated without the ones before it, and a checkpoint
needs no state of a generator.
"""

from __future__ import annotations

import contextlib
import hashlib
import resource
import sys
from collections.abc import Iterator
from typing import Literal

import torch

_MIB = 2**20

Purpose = Literal["order", "noise"]
"""``order``: the order of the training images. ``noise``: augmentation and dropout."""


def best_device() -> torch.device:
    """The process's CUDA device where it has one, else the CPU."""
    return resolved(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def resolved(device: torch.device) -> torch.device:
    """``device`` with its index, so that it compares equal to the device of a tensor on it."""
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def visible() -> list[tuple[str, float]]:
    """Name and memory in GiB of every CUDA device that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [(str(device.name), device.total_memory / 2**30) for device in found]


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on ``device``; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory_mib` start anew, where the device allows (a CPU process does not)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far, MiB: tensors on the GPU, or everything of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (_MIB if sys.platform == "darwin" else 1024)


def stream(seed: int, purpose: Purpose, epoch: int) -> int:
    """The seed for one purpose in one epoch: 63 bits that depend on all three arguments."""
    key = f"{purpose}:{epoch}:{seed}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1


def noise_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout draws from on ``device``: torch's default one.

    Augmentation draws from it too. A CUDA graph then knows the generator of every random kernel
    in it without being told, and replays continue the very stream that eager steps would use.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


@contextlib.contextmanager
def noise(device: torch.device, seed: int) -> Iterator[None]:
    """Draw dropout and augmentation from ``seed``, and put the generator back afterwards."""
    generator = noise_generator(device)
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


@contextlib.contextmanager
def own_noise(generator: torch.Generator) -> Iterator[None]:
    """Let ``generator`` be torch's default one on its device: what is drawn and seeded is its.

    On CUDA the default generator takes over the state itself, not a copy: a graph that is captured
    here reads this state on every replay. With one state for all, replays side by side would draw
    from each other's stream, and where torch keeps seed and offset on the device once a state (2.15
    keeps them once a graph) overwrite those of a step that is still running.
    """
    default = noise_generator(generator.device)
    if generator.device.type == "cuda":
        before = default.graphsafe_get_state()
        default.graphsafe_set_state(generator.graphsafe_get_state())
        try:
            yield
        finally:
            # another one where a capture has failed (`sweeper.training.capture`)
            generator.graphsafe_set_state(default.graphsafe_get_state())
            default.graphsafe_set_state(before)
        return
    saved = default.get_state()
    default.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(default.get_state())
        default.set_state(saved)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose the same deterministic algorithms every time; no change on a CPU.

    That makes convolutions repeatable at little cost. What stays open on CUDA is the backward
    pass of fused attention and the pooling kernels that add atomically: there the last bits may
    differ from run to run. A CPU repeats bit for bit with the same number of threads.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before

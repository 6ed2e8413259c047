"""Where the time of a captured training step goes: the kernels of its CUDA graph. Needs a GPU.

Steps are replayed one after the other, without what is between epochs, so a step is shown as the
device sees it: milliseconds (fastest and slowest of three rounds), how many kernels, and those that
take most of it.

    python benchmarks/bench_kernels.py mixer_r0              # alone, and 16 at once
    python benchmarks/bench_kernels.py mlp --trials 1 16 --compile off on --top 12
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable, Iterator

import step_rungs as rungs
import torch
from bench_step import MODELS, configured
from torch.profiler import ProfilerActivity, profile

from sweeper.config import TrialConfig
from sweeper.data import Dataset
from sweeper.training.cohort.engine import CohortEngine
from sweeper.training.engine import Engine

STEPS, ROUNDS, PROFILED = 120, 3, 10
Replays = tuple[str, Callable[[], None], Callable[[], None]]
"""What it is, one step, and back to the first batch."""


def alone(config: TrialConfig, dataset: Dataset, device: torch.device) -> Replays:
    """One trial."""
    engine = Engine(config, dataset=dataset, device=device)
    if engine._graph is None:
        raise SystemExit(f"there is no graph: {engine.graph}")
    return f"alone ({engine.compiled})", engine._graph.replay, engine._order.rewind


def together(config: TrialConfig, dataset: Dataset, device: torch.device, trials: int) -> Replays:
    """A cohort."""
    engine = CohortEngine(config, dataset=dataset, device=device)
    engine.arrange([engine.seat(rungs.changed(config, seed=seed)) for seed in range(trials)])
    engine.train(epochs=[1] * trials, lrs=[1e-3] * trials, before_batch=lambda: None)
    graph = engine._ready.graph
    if graph is None:
        raise SystemExit(f"there is no graph: {engine.graph}")
    return f"{trials} as a cohort ({engine.compiled})", graph.replay, engine._rewind


def shown(replays: Replays, top: int) -> float:
    """Time the steps and print their kernels; milliseconds of the fastest round's step."""
    label, replay, rewind = replays
    found = []
    for _ in range(ROUNDS):
        rewind()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            replay()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) / STEPS * 1e3)
    rewind()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            replay()
        torch.cuda.synchronize()
    spent, launched = collections.Counter[str](), collections.Counter[str]()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.device_time / PROFILED
            launched[event.name] += 1 / PROFILED
    print(
        f"{label}: {min(found):.3f} to {max(found):.3f} ms a step, "
        f"{sum(launched.values()):.0f} kernels",
        flush=True,
    )
    for name, microseconds in spent.most_common(top):
        print(f"  {microseconds:9.1f} us {launched[name]:6.1f} x {name[:120]}")
    return min(found)


def ways(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[int, Replays]]:
    shape, batch, _ = MODELS[options.model]
    dataset = rungs.images(shape, batch * (STEPS + 1), device)
    for compiled in options.compile:
        config = rungs.changed(configured(options.model), compile=compiled, graph="on")
        for trials in options.trials:
            made = (config, dataset, device)
            yield trials, alone(*made) if trials == 1 else together(*made, trials)
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description="The kernels of a captured step.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--trials", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off"])
    parser.add_argument("--top", type=int, default=8, help="kernels shown")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a step is captured on a CUDA device, and there is none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.model}")
    one: float | None = None
    for trials, replays in ways(options, torch.device("cuda", torch.cuda.current_device())):
        step = shown(replays, options.top)
        if trials == 1:
            one = one or step
        elif one is not None:
            print(f"  {trials} at once: {trials * one / step:.2f} times one")


if __name__ == "__main__":
    main()

"""Images a second of every model of the reports, rung by rung, and of several trials at once.

One trial: a DataLoader and an eager step as a textbook writes them; images that stay on the device;
that step as one CUDA graph; the same compiled. Then 1, 4, 16 and 64 trials as a cohort, in lanes of
their own (on a GPU: streams), and in processes. The rungs of one trial are timed in turn, so that
what else the machine does hits all of them. Images are random, of the data set's shape. On a CPU
everything runs with one thread, as workers do, there are no graphs and no streams, and lanes train
one batch after the other.

Images a second are those of all trials together, the median of the repetitions, and the spread is
that from the slowest to the fastest. The roof is a large matrix product on the same device, in the
precision that the trial has there. "Of the memory" is the share of what a copy on the device moves
in a second that the optimizer alone accounts for: parameters, gradients and the two means of AdamW,
each read and written once a step.

"CPU ms" is the processor time of a step in this process, which says more than images a second on a
machine that others use as well. A compiled step says above its row how long that took, with
an empty folder of compiled code (``TORCHINDUCTOR_CACHE_DIR``) or with what was there.

    python benchmarks/bench_step.py                 # all, on the GPU where there is one
    python benchmarks/bench_step.py --quick         # a minute or two on a CPU
    python benchmarks/bench_step.py --models mlp mixer_p16 --trials 1 16 --json results.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import step_rungs as rungs
import torch

from sweeper.config import DataShape, TrialConfig
from sweeper.provenance import cpu_name
from sweeper.training.device import best_device, resolved
from sweeper.training.precision import precision_of

CIFAR, GREY = DataShape(3, 32, 32, 10), DataShape(1, 28, 28, 10)
TRAINED = {CIFAR: 45_000, GREY: 55_000}
"""Images of an epoch, those held out for validation not counted."""


def _mixer(**fields: Any) -> dict[str, Any]:
    return {"name": "mixer", **fields}


MODELS: dict[str, tuple[DataShape, int, dict[str, Any]]] = {
    "mixer_p4": (CIFAR, 128, _mixer(patch=4, embed_dim=256, blocks=4)),
    "mixer_p8": (CIFAR, 128, _mixer(patch=8, embed_dim=256, blocks=4)),
    "mixer_p16": (CIFAR, 128, _mixer(patch=16, embed_dim=256, blocks=4)),
    "mixer_r0": (
        GREY,
        128,
        _mixer(patch=4, embed_dim=8, blocks=12, token_hidden="4N", channel_hidden="4C"),
    ),
    "mixer_r2": (
        GREY,
        128,
        _mixer(patch=4, embed_dim=16, blocks=2, token_hidden=512, channel_hidden=512),
    ),
    "mixer_r3": (
        GREY,
        256,
        _mixer(patch=4, embed_dim=16, blocks=8, token_hidden=1024, channel_hidden=512),
    ),
    "mlp": (GREY, 128, {"name": "mlp", "width": 512, "layers": 2}),
    "vit": (
        GREY,
        128,
        {"name": "vit", "patch": 4, "embed_dim": 64, "blocks": 6, "heads": 4},
    ),
    "cnn": (CIFAR, 64, {"name": "cnn"}),
    "resnet18": (CIFAR, 128, {"name": "resnet18"}),
}
QUICK = ("mlp", "mixer_r0")


def main() -> None:
    options = _options()
    device = resolved(torch.device(options.device)) if options.device else best_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    results: dict[str, Any] = {}
    print(_machine(device))
    for name in options.models:
        print(
            f"\n### {name}\n\n| trials | rung | images/s | spread | s/epoch of all | CPU ms "
            f"| of the roof | of the memory |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        results[name] = _measured(name, options, device)
    if options.json:
        options.json.write_text(json.dumps({"machine": _machine(device), "models": results}))


def _measured(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    shape, batch, model = MODELS[name]
    config = TrialConfig.model_validate(
        {
            "data": {"name": "cifar10" if shape == CIFAR else "mnist", "standardize": "channel"},
            "model": model,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "train": {"batch_size": batch},
        }
    )
    dataset = rungs.images(shape, batch * options.batches, device)
    precision = precision_of(config.train, device)
    share = rungs.flops(config, shape) / rungs.roof(device, precision.autocast or precision.dtype)
    moved = rungs.update_bytes(config, shape) / batch / rungs.bandwidth(device)
    count, found = len(dataset.train), {}

    def show(trials: int, rung: str, seconds: list[float], cpu: list[float] | None = None) -> None:
        rates = [trials * count / each for each in seconds]
        own = f"{statistics.median(cpu) / options.batches * 1e3:.3g}" if cpu else ""
        rate = statistics.median(rates)
        spread = (max(rates) - min(rates)) / rate
        epoch = TRAINED[shape] * trials / rate
        cells = f"{rate:,.0f} | {spread:.0%} | {epoch:.3g} | {own} | {rate * share:.1%}"
        print(f"| {trials} | {rung} | {cells} | {rate * moved:.1%} |", flush=True)
        found[f"{trials} {rung}"] = {
            "images_per_s": rates,
            "of_roof": rate * share,
            "of_memory": rate * moved,
            "cpu_s": cpu,
        }

    with contextlib.ExitStack() as stack:
        single = {
            rung: stack.enter_context(made)
            for rung, made in _single(config, dataset, device, options).items()
        }
        times: dict[str, list[float]] = {rung: [] for rung in single}
        cpu: dict[str, list[float]] = {rung: [] for rung in single}
        for run in single.values():
            run()
        for _ in range(options.repetitions):
            for rung, run in single.items():
                began = time.process_time()
                times[rung].append(run())
                cpu[rung].append(time.process_time() - began)
    for rung, seconds in times.items():
        show(1, rung, seconds, cpu[rung])
    for trials in options.trials:
        for rung, make in _several(model["name"]).items():
            if rung == "processes" and trials > options.most_processes:
                continue
            seconds = _timed(make, config, dataset, device, trials, options.repetitions)
            if seconds:
                show(trials, rung, seconds)
            else:
                print(f"| {trials} | {rung} | does not fit into memory | | | | | |")
    return found


def _single(
    config: TrialConfig, dataset: Any, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    eager = rungs.changed(config, graph="off")
    ways = {
        "DataLoader, eager": rungs.textbook(config, dataset, device, options.loaders),
        "on the device": rungs.alone(eager, dataset, device),
    }
    if device.type == "cuda":
        graph = rungs.changed(config, graph="on")
        ways["+ CUDA graph"] = rungs.alone(graph, dataset, device)
        ways["+ compile"] = rungs.alone(rungs.changed(graph, compile="on"), dataset, device)
    elif options.compile or not options.quick:
        compiled = rungs.changed(eager, compile="on")
        ways["+ compile"] = rungs.alone(compiled, dataset, device)
    return ways


def _several(model: str) -> dict[str, Any]:
    ways: dict[str, Any] = {} if model == "resnet18" else {"cohort": rungs.cohort}
    return {**ways, "streams": rungs.streams, "processes": rungs.processes}


def _timed(
    make: Any, config: TrialConfig, dataset: Any, device: torch.device, trials: int, times: int
) -> list[float]:
    """Seconds of each repetition, none where memory does not suffice."""
    try:
        with make(config, dataset, device, trials) as run:
            run()
            return [run() for _ in range(times)]
    except (MemoryError, torch.OutOfMemoryError):
        return []
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _machine(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, 1 thread"
    )
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Images a second, rung by rung.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None)
    parser.add_argument("--trials", nargs="*", type=int, default=None, help="trials at once")
    parser.add_argument("--compile", action="store_true", help="with --quick, compile as well")
    parser.add_argument("--batches", type=int, default=None, help="batches a call")
    parser.add_argument("--repetitions", type=int, default=None)
    parser.add_argument("--loaders", type=int, default=2, help="processes of the DataLoader")
    parser.add_argument("--most-processes", type=int, default=None)
    parser.add_argument("--device", default=None, help="cuda or cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="few models, trials and batches")
    options = parser.parse_args()
    quick = options.quick
    options.models = options.models or list(QUICK if quick else MODELS)
    if options.trials is None:
        options.trials = [1, 4] if quick else [1, 4, 16, 64]
    options.batches = options.batches or (3 if quick else 100)
    options.repetitions = options.repetitions or (3 if quick else 5)
    options.most_processes = options.most_processes or (2 if quick else 16)
    return options


if __name__ == "__main__":
    main()

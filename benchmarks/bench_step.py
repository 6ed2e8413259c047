"""Images a second of every model of the reports, rung by rung, and of several trials at once.

One trial: a DataLoader and an eager step as a textbook writes them; images that stay on the device;
that step as one CUDA graph; the same compiled. Then 1, 4, 16 and 64 trials as a cohort, in lanes of
their own (on a GPU: streams), and in processes, and 16 as a compiled cohort. Rungs that are
compared are timed in turn, so that what else the machine does hits all of them. Images are random,
of the data set's shape. On a CPU everything runs with one thread, as workers do, there are no
graphs and no streams, and lanes train one batch after the other.

Images a second are those of all trials together, the median of the repetitions, and the spread is
that from the slowest to the fastest. The roof is a large matrix product on the same device, in the
precision that the trial has there. "Of the memory" is the share of what a copy on the device moves
in a second that the optimizer alone accounts for: parameters, gradients and the two means of AdamW,
each read and written once a step.

"CPU ms" is the processor time of a step in this process, which says more than images a second on a
machine that others use as well. A compiled step says above its row how long that took, with
an empty folder of compiled code (``TORCHINDUCTOR_CACHE_DIR``) or with what was there.

What is wanted most comes first: the step of every model eager, captured and compiled, then 16
trials at once; ``--only`` takes some of it. Every row is printed and written to the JSON file as
soon as it is measured, so a run that is broken off keeps what it has. With ``--minutes`` nothing
begins that is not expected to end in time. A rung that fails is told and left out.

    python benchmarks/bench_step.py                 # all, on the GPU where there is one
    python benchmarks/bench_step.py --minutes 7 --json results.json
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
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import step_rungs as rungs
import torch

from sweeper.config import DataShape, TrialConfig
from sweeper.data import Dataset
from sweeper.provenance import cpu_name
from sweeper.training.device import best_device, resolved
from sweeper.training.precision import precision_of

CIFAR, GREY = DataShape(3, 32, 32, 10), DataShape(1, 28, 28, 10)
TRAINED = {CIFAR: 45_000, GREY: 55_000}
"""Images of an epoch, those held out for validation not counted."""


def _mixer(**fields: Any) -> dict[str, Any]:
    return {"name": "mixer", **fields}


MODELS: dict[str, tuple[DataShape, int, dict[str, Any]]] = {
    "mixer_p8": (CIFAR, 128, _mixer(patch=8, embed_dim=256, blocks=4)),
    "mixer_p16": (CIFAR, 128, _mixer(patch=16, embed_dim=256, blocks=4)),
    "mixer_p4": (CIFAR, 128, _mixer(patch=4, embed_dim=256, blocks=4)),
    "mixer_r3": (
        GREY,
        256,
        _mixer(patch=4, embed_dim=16, blocks=8, token_hidden=1024, channel_hidden=512),
    ),
    "resnet18": (CIFAR, 128, {"name": "resnet18"}),
    "cnn": (CIFAR, 64, {"name": "cnn"}),
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
    "mlp": (GREY, 128, {"name": "mlp", "width": 512, "layers": 2}),
    "vit": (
        GREY,
        128,
        {"name": "vit", "patch": 4, "embed_dim": 64, "blocks": 6, "heads": 4},
    ),
}
"""In the order in which they are measured."""


def configured(name: str) -> TrialConfig:
    """The trial of a model: AdamW, its batches, its data set's shape."""
    shape, batch, model = MODELS[name]
    return TrialConfig.model_validate(
        {
            "data": {
                "name": "cifar10" if shape == CIFAR else "mnist",
                "standardize": "channel",
            },
            "model": model,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "train": {"batch_size": batch},
        }
    )


TOGETHER = ("mixer_r0", "mlp", "mixer_r3", "vit", "mixer_p16", "mixer_r2")
"""Those of which several at once are measured first: small ones, which leave most of a GPU idle."""

AT_ONCE = 16
AIMS: dict[str, dict[str, float]] = {
    "mixer_p8": {"epoch_s": 0.15, "graph": 2.5},
    "mixer_p16": {"epoch_s": 0.15, "graph": 2.5, "together": 2.0},
    "mixer_p4": {"epoch_s": 0.40},
    "mixer_r3": {"epoch_s": 0.35, "together": 8.0},
    "resnet18": {"epoch_s": 1.0},
    "cnn": {"epoch_s": 0.06},
    "mixer_r0": {"together": 8.0},
    "mixer_r2": {"together": 8.0},
    "mlp": {"together": 8.0},
    "vit": {"together": 3.0},
}
"""What an H200 should reach: seconds an epoch at most, and at least how many times as fast the
captured step is as the eager one, and :data:`AT_ONCE` trials at once as one captured trial."""
QUICK = ("mlp", "mixer_r0")
PARTS = ("step", "compiled", "together", "processes", "loader")

EAGER, GRAPH, COMPILED, LOADER = "on the device", "+ CUDA graph", "+ compile", "DataLoader, eager"
_DATALOADER_BATCHES = 50
"""A DataLoader is so slow that a few batches are enough to see it."""


@dataclass(kw_only=True)
class Bench:
    """What is measured of the models, and what was found."""

    options: argparse.Namespace
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    _subjects: dict[str, Subject] = field(default_factory=dict)
    _images: dict[DataShape, Dataset] = field(default_factory=dict)
    _roofs: dict[torch.dtype, float] = field(default_factory=dict)
    _moved: float = 0.0

    def subject(self, name: str) -> Subject:
        """A model with its images."""
        if name not in self._subjects:
            self._subjects[name] = self._made(name)
        return self._subjects[name]

    def _made(self, name: str) -> Subject:
        shape, batch, _ = MODELS[name]
        config = configured(name)
        if shape not in self._images:
            largest = max(size for each, size, _ in MODELS.values() if each == shape)
            count = largest * self.options.batches
            self._images[shape] = rungs.images(shape, count, self.device)
        precision = precision_of(config.train, self.device)
        dtype = precision.autocast or precision.dtype
        if dtype not in self._roofs:
            self._roofs[dtype] = rungs.roof(self.device, dtype)
        self._moved = self._moved or rungs.bandwidth(self.device)
        return Subject(
            config=config,
            shape=shape,
            dataset=rungs.shortened(self._images[shape], batch * self.options.batches),
            of_roof=rungs.flops(config, shape) / self._roofs[dtype],
            of_memory=rungs.update_bytes(config, shape) / batch / self._moved,
        )

    def compared(self, name: str, ways: dict[str, Any], *, trials: int = 1) -> None:
        """Time these rungs in turn and show them; one that fails is told, the others go on."""
        times: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        with contextlib.ExitStack() as stack:
            runs: dict[str, Callable[[], float]] = {}
            for rung, made in ways.items():
                with self._told(f"{trials} x {name}, {rung}"):
                    run = stack.enter_context(made)
                    run()
                    runs[rung] = run
            for _ in range(self.options.repetitions):
                for rung, run in list(runs.items()):
                    with self._told(f"{trials} x {name}, {rung}", lambda r=rung: runs.pop(r)):
                        began = time.process_time()
                        times.setdefault(rung, []).append(run())
                        cpu.setdefault(rung, []).append(time.process_time() - began)
        for rung in runs:
            self._show(name, trials, rung, times[rung], cpu[rung])

    def rate(self, name: str, trials: int, rung: str) -> float | None:
        """Images a second of a row that was measured."""
        for row in reversed(self.rows):
            if (row["model"], row["trials"], row["rung"]) == (name, trials, rung):
                return statistics.median(row["images_per_s"])
        return None

    def _show(
        self, name: str, trials: int, rung: str, seconds: list[float], cpu: list[float]
    ) -> None:
        subject = self.subject(name)
        count = subject.batches_of(rung) * subject.config.train.batch_size
        rates = [trials * count / each for each in seconds]
        rate = statistics.median(rates)
        spread = (max(rates) - min(rates)) / rate
        epoch = TRAINED[subject.shape] * trials / rate
        own = f"{statistics.median(cpu) / subject.batches_of(rung) * 1e3:.3g}"
        own = own if rung != "processes" else ""
        cells = f"{rate:,.0f} | {spread:.0%} | {epoch:.3g} | {own} | {rate * subject.of_roof:.1%}"
        print(
            f"| {name} | {trials} | {rung} | {cells} | {rate * subject.of_memory:.1%} |", flush=True
        )
        self.rows.append(
            {
                "model": name,
                "trials": trials,
                "rung": rung,
                "images_per_s": rates,
                "epoch_s": epoch,
                "of_roof": rate * subject.of_roof,
                "of_memory": rate * subject.of_memory,
                "cpu_s": cpu,
            }
        )
        self.save()

    def save(self) -> None:
        """Write what there is, whole or not at all."""
        file: Path | None = self.options.json
        if file is None:
            return
        found = {"machine": _machine(self.device), "rows": self.rows, "trouble": self.trouble}
        temporary = file.with_name(f"{file.name}.tmp")
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(file)

    def tell(self, what: str) -> None:
        """Something that was not measured, and why."""
        print(f"({what})", flush=True)
        self.trouble.append(what)
        self.save()

    @contextlib.contextmanager
    def _told(self, what: str, then: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """Go on after a failure, which is told."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            then()
            self.tell(f"{what}: does not fit into memory")
        except Exception as error:  # noqa: BLE001 - whatever it is, the other rungs are wanted
            then()
            traceback.print_exc()
            said = (str(error).strip().splitlines() or [""])[0]
            self.tell(f"{what}: {type(error).__name__}: {said}")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is measured. ``of_roof`` and ``of_memory``: the share of them that one image a
    second takes."""

    config: TrialConfig
    shape: DataShape
    dataset: Dataset
    of_roof: float
    of_memory: float

    def batches_of(self, rung: str) -> int:
        """How many batches a call of a rung trains on."""
        full = len(self.dataset.train) // self.config.train.batch_size
        return min(full, _DATALOADER_BATCHES) if rung == LOADER else full


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some rungs of one model, one of :data:`PARTS`. Those of a ``kind`` take about as long as each
    other."""

    of: str
    kind: str
    model: str
    run: Callable[[Bench, str], None]


def main() -> None:
    options = _options()
    device = resolved(torch.device(options.device)) if options.device else best_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(options=options, device=device)
    print(
        f"{_machine(device)}\n\n| model | trials | rung | images/s | spread | s/epoch of all "
        "| CPU ms | of the roof | of the memory |\n| --- | --- | --- | --- | --- | --- | --- | --- "
        "| --- |"
    )
    end = time.monotonic() + options.minutes * 60 if options.minutes else None
    longest: dict[str, float] = {}
    for job in _jobs(options):
        began = time.monotonic()
        expected = longest.get(job.kind, max(longest.values(), default=0.0))
        if end is not None and began + expected > end:
            bench.tell(f"left out for want of time: {job.model}, {job.kind}")
            continue
        job.run(bench, job.model)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        longest[job.kind] = max(longest.get(job.kind, 0.0), time.monotonic() - began)
    bench.save()


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What is wanted most comes first; those that were asked for."""
    yield from (job for job in _all_jobs(options) if options.only is None or job.of in options.only)


def _all_jobs(options: argparse.Namespace) -> Iterator[Job]:
    models = options.models
    small = [model for model in TOGETHER if model in models]
    small_first = [*small, *(model for model in models if model not in small)]
    trials = sorted(options.trials, key=lambda many: (many != AT_ONCE, many))
    together = [
        Job(of="together", kind=f"{many} at once", model=model, run=_at_once(many))
        for many in trials
        for model in small_first
    ]
    in_processes = [
        Job(of="processes", kind=f"{many} processes", model=model, run=_in_processes(many))
        for many in trials
        if many <= options.most_processes
        for model in small_first
    ]
    compiles = options.compile or not options.quick
    yield from (Job(of="step", kind="a step", model=model, run=_step) for model in models)
    if compiles:
        yield from (
            Job(of="compiled", kind="compiled", model=model, run=_compiled) for model in models
        )
    yield from together[: len(small)]
    if compiles and AT_ONCE in trials:
        yield from (
            Job(of="compiled", kind="compiled together", model=model, run=_compiled_together)
            for model in small_first
            if model != "resnet18"
        )
    yield from in_processes[:3]
    yield from (
        Job(of="loader", kind="DataLoader", model=model, run=_dataloader) for model in models
    )
    yield from in_processes[3:]
    yield from together[len(small) :]


def _step(bench: Bench, name: str) -> None:
    subject, cuda = bench.subject(name), bench.device.type == "cuda"
    made = (subject.dataset, bench.device)
    ways = {EAGER: rungs.alone(rungs.changed(subject.config, graph="off"), *made)}
    if cuda:
        ways[GRAPH] = rungs.alone(rungs.changed(subject.config, graph="on"), *made)
    bench.compared(name, ways)
    eager, captured = bench.rate(name, 1, EAGER), bench.rate(name, 1, GRAPH)
    aims = AIMS[name]
    if captured and "epoch_s" in aims:
        epoch = TRAINED[subject.shape] / captured
        print(f"({name}: {epoch:.3g} s an epoch captured, at most {aims['epoch_s']:g} wanted)")
    if captured and eager:
        wanted = f", {aims['graph']:g} wanted" if "graph" in aims else ""
        print(f"({name}: captured {captured / eager:.2f} times as fast as eager{wanted})")


def _at_once(many: int) -> Callable[[Bench, str], None]:
    def run(bench: Bench, name: str) -> None:
        subject = bench.subject(name)
        made = (subject.config, subject.dataset, bench.device, many)
        ways: dict[str, Any] = {}
        if subject.config.model.name != "resnet18":
            ways["cohort"] = rungs.cohort(*made)
        ways["streams"] = rungs.streams(*made)
        for rung, way in ways.items():  # one after the other: all of them might not fit at once
            bench.compared(name, {rung: way}, trials=many)
            gc.collect()
        _say_together(bench, name, many, list(ways))

    return run


def _in_processes(many: int) -> Callable[[Bench, str], None]:
    def run(bench: Bench, name: str) -> None:
        subject = bench.subject(name)
        made = (subject.config, subject.dataset, bench.device, many)
        bench.compared(name, {"processes": rungs.processes(*made)}, trials=many)
        _say_together(bench, name, many, ["processes"])

    return run


def _say_together(bench: Bench, name: str, many: int, ways: list[str]) -> None:
    one = bench.rate(name, 1, GRAPH) or bench.rate(name, 1, EAGER)
    for rung in ways:
        rate = bench.rate(name, many, rung)
        if one and rate and many > 1:
            aim = AIMS[name].get("together") if many == AT_ONCE else None
            wanted = f", {aim:g} wanted" if aim and bench.device.type == "cuda" else ""
            print(f"({name}: {many} by {rung} {rate / one:.2f} times as fast as one{wanted})")


def _dataloader(bench: Bench, name: str) -> None:
    subject = bench.subject(name)
    count = subject.batches_of(LOADER) * subject.config.train.batch_size
    few = rungs.shortened(subject.dataset, count)
    loaders = bench.options.loaders
    bench.compared(name, {LOADER: rungs.textbook(subject.config, few, bench.device, loaders)})


def _compiled(bench: Bench, name: str) -> None:
    subject = bench.subject(name)
    graph = "on" if bench.device.type == "cuda" else "off"
    plain = rungs.changed(subject.config, graph=graph)
    made = (subject.dataset, bench.device)
    bench.compared(
        name,
        {
            GRAPH if graph == "on" else EAGER: rungs.alone(plain, *made),
            COMPILED: rungs.alone(rungs.changed(plain, compile="on"), *made),
        },
    )


def _compiled_together(bench: Bench, name: str) -> None:
    """As many as are wanted at once, with forward and backward pass compiled."""
    subject, rung = bench.subject(name), "cohort + compile"
    config = rungs.changed(subject.config, compile="on")
    made = rungs.cohort(config, subject.dataset, bench.device, AT_ONCE)
    bench.compared(name, {rung: made}, trials=AT_ONCE)
    _say_together(bench, name, AT_ONCE, [rung])


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
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing that ends later")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, help="parts of it")
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

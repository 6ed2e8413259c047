"""What a data set costs a worker: memory, the start of its first trial, the gap between two.

Workers of one thread, as `sweeper launch` starts them on a CPU, load one after the other and stay.
Each trains two trials, a whole epoch of a small MLP and the test part, so that every page is in
use. Then one real worker trains three trials on the same data, one trains three on a split each,
and two more train these again.

Memory is PSS: what several have counts once, divided by those who have it. The data folder is a
new one that links to the given one, so that the first worker finds nothing prepared.

    python benchmarks/bench_data.py --data ~/.cache/sweeper/data --images my_pictures
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.time()
os.environ["OMP_NUM_THREADS"] = "1"

TRIAL: dict[str, Any] = {
    "model": {"name": "mlp", "width": 32, "layers": 1},
    "train": {"epochs": 1, "batch_size": 128},
}
ONE: dict[str, Any] = {"search": {"trials": 1}}


class Child:
    """A process of this script that answers every line with a line of JSON."""

    def __init__(self, *arguments: str) -> None:
        self.began = time.time()
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self, said: str = "") -> dict[str, Any]:
        """Say a line, unless it is empty, and read the next one."""
        if self.process.stdin is None or self.process.stdout is None:
            raise SystemExit("a worker must have pipes")
        if said:
            self.process.stdin.write(f"{said}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def memory_mib(self) -> float:
        """PSS, from Linux's account of the process."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        (kib,) = (line.split()[1] for line in text.splitlines() if line.startswith("Pss:"))
        return int(kib) / 1024

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def trainer(section: str, folder: Path) -> None:
    """A worker's work without store and tracker: load and train when told to."""
    import torch
    import torch._dynamo  # with the first optimizer at the latest: 150 MiB that are no data

    from sweeper.study.spec import StudySpec
    from sweeper.training import prepare

    torch.set_num_threads(1)
    spec = StudySpec.model_validate({"name": "bench", "data": json.loads(section), **TRIAL, **ONE})
    config = spec.trial_config({})
    say(imports=time.time() - STARTED)
    sys.stdin.readline()
    dataset, builds_s = None, []
    for _ in range(2):
        began = time.perf_counter()
        training = prepare(config, folder=folder, dataset=dataset)
        builds_s.append(time.perf_counter() - began)
        dataset = training.dataset
        (measured,) = training.epochs()
        training.test()
    say(builds_s=builds_s, digest=dataset.digest if dataset else "", **measured.metrics)
    sys.stdin.readline()


def worker(sections: str, folder: Path) -> None:
    """A real worker with a store of its own; it says when what happened. MLflow is away."""
    from sweeper.settings import Settings
    from sweeper.store import open_store, studies, tickets
    from sweeper.study.spec import StudySpec
    from sweeper.tracking import SpoolTracker
    from sweeper.worker import Worker

    said: list[tuple[str, float, float]] = []

    def note(what: str) -> None:
        said.append((what, time.time(), time.process_time()))

    note("imported")
    spec = StudySpec.model_validate(json.loads(sections))
    home = folder / f"home-{os.getpid()}"
    settings = Settings.resolve(home=home, environment={"SWEEPER_DATA": str(folder)})
    store = open_store(settings.store_url)
    with store.exclusively():
        study = studies.create(store, spec)
        if study is None:
            raise SystemExit(f"{spec.name} is there already")
        tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=False))
    import sweeper.training
    import sweeper.training.engine
    import sweeper.worker.attempt

    note("torch")

    def marked(owner: Any, name: str, before: str, after: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            note(before)
            result = original(*arguments, **keywords)
            note(after)
            return result

        setattr(owner, name, wrapper)

    marked(Worker, "taken", "claimed", "taken")
    marked(sweeper.training, "load", "load", "loaded")
    marked(sweeper.training, "prepare", "prepare", "prepared")
    marked(sweeper.training.engine.Engine, "train", "step", "trained")
    marked(sweeper.worker.attempt.Attempt, "end", "end", "ended")
    logging.disable(logging.WARNING)  # that MLflow is away
    with SpoolTracker(settings.spool, "http://127.0.0.1:9") as tracker:
        Worker(store=store, tracker=tracker, settings=settings, study=spec.name).run()
    say(events=said)


def memory(name: str, section: dict[str, Any], folder: Path, count: int) -> None:
    """``count`` workers at once, which load and train one after the other."""
    children = [
        Child("--trainer", json.dumps(section), "--folder", str(folder)) for _ in range(count)
    ]
    try:
        for child in children:
            child.answer()
        idle = sum(child.memory_mib() for child in children)
        for number, child in enumerate(children, 1):
            found = child.answer("train")
            first_s, second_s = found["builds_s"]
            print(
                f"{name}, worker {number} of {count}: load and build {first_s:.2f} s, next trial "
                f"{second_s:.2f} s, loss {found['train_loss']:.9f}, data {found['digest']}",
                flush=True,
            )
        used = sum(child.memory_mib() for child in children)
        print(
            f"{name}, {count} workers: PSS of all {used:.0f} MiB, {used - idle:.0f} MiB of them "
            f"beyond imports, {(used - idle) / count:.0f} MiB a worker",
            flush=True,
        )
    finally:
        for child in children:
            child.end()


def gaps(name: str, section: dict[str, Any], folder: Path, *, changing: bool) -> None:
    """One worker, three trials: from process start to the first step, and from trial to trial."""
    axis = "data.split_seed" if changing else "train.seed"
    study = {"name": "bench", "data": section, **TRIAL, "parameters": {axis: [0, 1, 2]}}
    study["search"] = {"sampler": "grid"}
    child = Child("--worker", json.dumps(study), "--folder", str(folder))
    events: list[tuple[str, float, float]] = child.answer()["events"]
    child.end()
    first = {what: when - child.began for what, when, _ in reversed(events)}
    print(
        f"{name}, {axis} changes: process start to imports {first['imported']:.2f} s, torch "
        f"{first['torch']:.2f} s, first claim {first['claimed']:.2f} s, first step "
        f"{first['step']:.2f} s",
        flush=True,
    )
    last: dict[str, tuple[float, float]] = {}
    pieces: dict[str, float] = {}
    for what, when, cpu in events:
        opener = {"claimed": "ended", "loaded": "load", "prepared": "prepare"}.get(what)
        if opener in last:
            pieces[what] = when - last[opener][0]
        if what == "step" and "ended" in last:
            parts = ", ".join(f"{key} {value * 1000:.0f}" for key, value in pieces.items())
            gap_ms, cpu_ms = (
                1000 * (now - then) for now, then in zip((when, cpu), last["ended"], strict=True)
            )
            print(f"  gap {gap_ms:.0f} ms, of CPU time {cpu_ms:.0f} ms ({parts})", flush=True)
        if what == "ended":
            pieces = {}
        last[what] = (when, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("~/.cache/sweeper/data"))
    parser.add_argument("--images", type=Path, help="an image folder (train/<class>, test/<class>)")
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        return trainer(options.trainer, options.folder)
    if options.worker:
        return worker(options.worker, options.folder)
    from sweeper.provenance import cpu_name, versions

    print(f"{cpu_name()}, {platform.platform()}; {versions()}; load {os.getloadavg()[0]:.1f}")
    data = options.data.expanduser().absolute()
    second = {"name": "cifar10"}
    if options.images:
        second = {"name": "image_folder", "root": str(options.images.expanduser().absolute())}
    for section in ({"name": "mnist"}, second):
        name = section["name"]
        for changing in (False, True):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                for each in data.iterdir():
                    if each.is_dir() and each.name != "cache":
                        (folder / each.name).symlink_to(each)
                for count in () if changing else options.workers:
                    memory(name, section, folder, count)
                for _ in range(3 if changing else 1):
                    gaps(name, section, folder, changing=changing)
    return None


if __name__ == "__main__":
    main()

"""What the store and the tracker cost: trials through a worker against the bare training loop.

Both train the same trials on the same data in this process, in turn, A B A B …; the worker with
a real store, a real spool and a real MLflow server beside it. Printed: seconds of each, the ratio
pair by pair, and what a worker spends in calls of the store and the tracker.

    python benchmarks/bench_overhead.py --pairs 3 --trials 2 --seconds 10
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from sweeper.provenance import cpu_name, versions
from sweeper.settings import Settings
from sweeper.store import Store, held, open_store, queue, studies, tickets
from sweeper.study.spec import StudySpec
from sweeper.tracking import LocalServer, SpoolTracker
from sweeper.training import prepare
from sweeper.worker import Worker

STUDY: dict[str, Any] = {
    "name": "overhead",
    "data": {"name": "digits"},
    "model": {"name": "mixer", "patch": 2, "embed_dim": 32, "blocks": 2},
    "train": {"epochs": 30, "batch_size": 64},
    "search": {"sampler": "tpe", "pruner": {"name": "median"}},
    "parameters": {
        "optimizer.lr": {"low": 1e-3, "high": 1.0000001e-3, "log": True},
        "optimizer.weight_decay": {"low": 0.0, "high": 1e-9},
    },
}


def calibrated(seconds: float, epochs: int) -> int:
    """How many blocks the model needs for ``epochs`` epochs to take ``seconds`` on this machine."""
    spec = StudySpec.model_validate({**STUDY, "search": {"trials": 1}})
    training = prepare(spec.trial_config({}), folder=Path())
    measured = training.epochs()
    next(measured)
    began = time.perf_counter()
    for _ in range(5):
        next(measured)
    a_block_s = (time.perf_counter() - began) / 5 / STUDY["model"]["blocks"]
    return max(1, round(seconds / epochs / a_block_s))


def bare(spec: StudySpec, trials: int) -> float:
    """Seconds of the training loop alone."""
    began = time.perf_counter()
    dataset = None
    for _ in range(trials):
        training = prepare(
            spec.trial_config({"optimizer.lr": 1e-3}), folder=Path(), dataset=dataset
        )
        dataset = training.dataset
        for _measurement in training.epochs():
            pass
        training.test()
    return time.perf_counter() - began


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds spent in ``owner.name`` while the context lasts."""
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args, **keywords)
        finally:
            spent[f"{getattr(owner, '__name__', owner).rsplit('.')[-1]}.{name}"] += (
                time.perf_counter() - began
            )

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, original)


def through_worker(
    spec: StudySpec, store: Store, tracker: SpoolTracker, settings: Settings
) -> tuple[float, dict[str, float]]:
    """Seconds of the same trials through the queue, and seconds in store and tracker calls."""
    with store.exclusively():
        study = studies.create(store, spec)
        if study is None:
            raise SystemExit(f"{spec.name} is there already")
        tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=False))
    spent: dict[str, float] = defaultdict(float)
    calls: list[tuple[Any, str]] = [
        (queue, "claim"),
        *((held, name) for name in ("values_of", "report_all", "should_prune", "note", "finish")),
        *((SpoolTracker, name) for name in ("start", "log", "note", "artifact", "end")),
    ]
    worker = Worker(store=store, tracker=tracker, settings=settings, study=spec.name)
    from contextlib import ExitStack

    with ExitStack() as stack:
        for owner, name in calls:
            stack.enter_context(timed(owner, name, spent))
        began = time.perf_counter()
        worker.run()
        return time.perf_counter() - began, dict(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one trial")
    parser.add_argument("--epochs", type=int, default=30, help="of one trial")
    parser.add_argument("--store", help="URL of a store; SQLite in a new folder by default")
    options = parser.parse_args()
    blocks = calibrated(options.seconds, options.epochs)
    print(f"{cpu_name()}, {platform.platform()}; {versions()}")
    print(f"{options.trials} trials of {options.epochs} epochs each, {options.pairs} pairs")
    ratios, shares = [], []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.resolve(home=folder, store=options.store, environment=os.environ)
        store = open_store(settings.store_url)
        with LocalServer(settings) as server, SpoolTracker(settings.spool, server.ensure()) as t:
            for pair in range(options.pairs):
                spec = StudySpec.model_validate(
                    {
                        **STUDY,
                        "name": f"overhead-{os.getpid()}-{pair}",
                        "model": {**STUDY["model"], "blocks": blocks},
                        "train": {**STUDY["train"], "epochs": options.epochs},
                        "search": {**STUDY["search"], "trials": options.trials},
                    }
                )
                alone = bare(spec, options.trials)
                whole, spent = through_worker(spec, store, t, settings)
                ratios.append(whole / alone)
                shares.append(sum(spent.values()) / whole)
                top = sorted(spent.items(), key=lambda item: -item[1])[:4]
                print(
                    f"pair {pair}: bare {alone:.2f} s, worker {whole:.2f} s, "
                    f"ratio {whole / alone:.4f}, in calls {shares[-1]:.2%} ("
                    + ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in top)
                    + ")"
                )
    print(
        f"ratio: median {statistics.median(ratios):.4f} "
        f"(min {min(ratios):.4f}, max {max(ratios):.4f}); "
        f"calls: median {statistics.median(shares):.2%}"
    )
    sys.exit(0)


if __name__ == "__main__":
    main()

"""What the store costs: claim, ask, report and tell with a history, and many workers at once.

For each database, each length of history and each number of worker processes: every worker claims
trials, draws their parameters (TPE, six parameters), reports epochs and ends them, as `sweeper
worker` does, without training in between. Printed: milliseconds of each call (median and 95th
percentile of wall time, median of CPU time of the process), trials and claims a second over all
workers, and what one look at the study costs. On a busy machine compare the CPU times.

    python benchmarks/bench_store.py             # minutes
    python benchmarks/bench_store.py --quick     # seconds: SQLite, short histories, two workers
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sqlalchemy
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeper.provenance import cpu_name, versions
from sweeper.store import (
    Outcome,
    Store,
    StoredStudy,
    held,
    open_store,
    queue,
    sampling,
    studies,
    tables,
    tickets,
)
from sweeper.store import attributes as attr
from sweeper.study.spec import StudySpec

STUDY: dict[str, Any] = {
    "name": "store",
    "data": {"name": "digits"},
    "model": {"name": "mixer", "patch": 2, "embed_dim": 32, "blocks": 2},
    "train": {"epochs": 30, "batch_size": 64},
    "search": {"sampler": "tpe", "pruner": {"name": "median"}},
    "parameters": {
        "optimizer.lr": {"low": 1e-4, "high": 0.1, "log": True},
        "optimizer.weight_decay": {"low": 0.0, "high": 0.1},
        "optimizer.name": {"values": ["sgd", "adam", "adamw"]},
        "model.embed_dim": {"low": 16, "high": 256},
        "model.blocks": {"values": [1, 2, 4]},
        "train.batch_size": {"low": 32, "high": 256, "step": 32},
    },
}
EPOCHS = 30
Spent = dict[str, list[tuple[float, float]]]
"""Milliseconds of wall and of CPU time of every call, by what it was."""


def spec_of(name: str, trials: int) -> StudySpec:
    return StudySpec.model_validate(
        {**STUDY, "name": name, "search": {**STUDY["search"], "trials": trials}}
    )


def history(spec: StudySpec, trials: int) -> list[FrozenTrial]:
    """Trials as workers leave them: parameters, thirty epochs, metrics; a third pruned."""
    dice = random.Random(0)
    began = datetime.now() - timedelta(days=1)
    found = []
    for number in range(trials):
        pruned = dice.random() < 1 / 3
        top = dice.uniform(0.3, 0.9)
        last = dice.randint(1, EPOCHS - 1) if pruned else EPOCHS
        series = {e: top * (1 - 0.8**e) + dice.gauss(0, 0.01) for e in range(1, last + 1)}
        params = {
            "optimizer.lr": 10 ** dice.uniform(-4, -1),
            "optimizer.weight_decay": dice.uniform(0, 0.1),
            "optimizer.name": dice.choice(["sgd", "adam", "adamw"]),
            "model.embed_dim": dice.randint(16, 256),
            "model.blocks": dice.choice([1, 2, 4]),
            "train.batch_size": 32 * dice.randint(1, 8),
        }
        encoded = sampling.encoded(spec, params)
        found.append(
            create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                value=series[last] if pruned else max(series.values()),
                params=encoded,
                distributions={p: sampling.distribution(spec.parameters[p]) for p in encoded},
                intermediate_values=series,
                user_attrs={
                    attr.TICKET: "sampler",
                    attr.ATTEMPT: 1,
                    attr.WORKER: f"host-{number % 8}",
                    attr.DRAWN: True,
                    attr.PARAMETERS: 12345,
                    attr.RUN_ID: uuid.UUID(int=dice.getrandbits(128)).hex,
                    attr.OUTCOME: "pruned" if pruned else "completed",
                    attr.METRICS: {
                        f"{part}_{what}": dice.random()
                        for part in ("train", "val", "best_val", "test")
                        for what in ("accuracy", "loss")
                    },
                    attr.SECONDS: dice.uniform(5, 15),
                },
            )
        )
        found[-1].datetime_start = began + timedelta(seconds=number)
        found[-1].datetime_complete = began + timedelta(seconds=number + 10)
    return found


def seeded(store: Store, name: str, trials: int, waiting: int) -> tuple[StoredStudy, float]:
    """A study with a history and ``waiting`` trials; the seconds of CPU that enqueueing took."""
    spec = spec_of(name, trials + waiting)
    with store.exclusively():
        study = studies.create(store, spec)
        if study is None:
            raise SystemExit(f"{name} is there already")
        with store.backend.engine.begin() as connection:
            tables.insert(connection, study.id, history(spec, trials))
        began = time.process_time()
        planned = tickets.tickets(spec, with_reference=False)
        added = tickets.fill(store, study.id, spec, planned)
        took = time.process_time() - began
    if added != waiting:
        raise SystemExit(f"{waiting} trials must be waiting, but {added} were enqueued")
    return study, took


@contextmanager
def timed(spent: Spent, what: str) -> Iterator[None]:
    began, began_cpu = time.perf_counter(), time.process_time()
    yield
    cpu_ms = (time.process_time() - began_cpu) * 1000
    spent[what].append(((time.perf_counter() - began) * 1000, cpu_ms))


def work(
    url: str, name: str, barrier: Barrier, share: int, epochs: int, answer: Any, at: int
) -> None:
    """One worker: its share of trials, and how long each call took."""
    store = open_store(url)
    study = studies.load(store, name)
    spent: Spent = defaultdict(list)
    barrier.wait()
    began = time.time()
    for _ in range(share):
        with timed(spent, "claim"):
            claimed = queue.claim(store, study.id, f"worker-{at}")
        if claimed is None:
            break
        first = "first ask" if not spent["first ask"] else "ask"
        with timed(spent, first):
            held.values_of(study.spec, study.study, claimed)
        told: dict[int, float] = {}
        for epoch in range(1, epochs + 1):
            value = told[epoch] = random.random()
            with timed(spent, "report"):
                held.report(store, claimed, epoch, value)
            if epoch > 1:
                with timed(spent, "prune?"):
                    held.should_prune(store, study.study, claimed, epoch, told)
        with timed(spent, "tell"):
            facts = {attr.METRICS: {"val_accuracy": 0.5}, attr.SECONDS: 1.0}
            held.finish(
                store,
                study.study,
                claimed,
                outcome=Outcome.COMPLETED,
                values=[max(told.values())],
                facts=facts,
            )
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer.put((began, time.time(), dict(spent), peak_mib))


def claim_only(url: str, name: str, barrier: Barrier, answer: Any, at: int) -> None:
    """One worker that claims until nothing waits."""
    store = open_store(url)
    study_id = studies.load(store, name).id
    barrier.wait()
    began, claims = time.time(), 0
    while queue.claim(store, study_id, f"claimer-{at}"):
        claims += 1
    answer.put((began, time.time(), claims))


def together(count: int, target: Callable[..., None], *arguments: Any) -> list[Any]:
    """What ``count`` processes that start at once answer."""
    context = multiprocessing.get_context("fork")  # no import a process, no connection is shared
    barrier, answers = context.Barrier(count), context.Queue()
    url, name, *rest = arguments
    processes = [
        context.Process(target=target, args=(url, name, barrier, *rest, answers, at))
        for at in range(count)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=1200) for _ in processes]
    for process in processes:
        process.join()
    return found


def figures(values: list[tuple[float, float]]) -> str:
    walls = sorted(wall for wall, _ in values)
    high = walls[min(len(walls) - 1, int(0.95 * len(walls)))]
    cpu = statistics.median(cpu for _, cpu in values)
    return f"{statistics.median(walls):.1f} / {high:.1f} / {cpu:.1f}"


def measure_workers(url: str, trials: int, workers: int, share: int, epochs: int) -> dict[str, Any]:
    """All calls of ``workers`` processes behind a history of ``trials``."""
    name = f"s{uuid.uuid4().hex[:8]}"
    store = open_store(url)
    _, enqueue_s = seeded(store, name, trials, workers * share)
    store.close()
    answers = together(workers, work, url, name, share, epochs)
    spent: Spent = defaultdict(list)
    for _, _, own, _ in answers:
        for what, values in own.items():
            spent[what] += values
    wall = max(a[1] for a in answers) - min(a[0] for a in answers)
    return {
        "history": trials,
        "workers": workers,
        "enqueue_ms_each": enqueue_s * 1000 / (workers * share),
        "trials_per_s": workers * share / wall,
        "peak_mib": max(a[3] for a in answers),
        **{what: figures(values) for what, values in spent.items()},
    }


def measure_claims(url: str, trials: int, workers: int, claims: int) -> float:
    """Claims a second over all workers."""
    name = f"c{uuid.uuid4().hex[:8]}"
    store = open_store(url)
    seeded(store, name, trials, claims)
    store.close()
    answers = together(workers, claim_only, url, name)
    if sum(a[2] for a in answers) != claims:
        raise SystemExit("every trial must be claimed once")
    return claims / (max(a[1] for a in answers) - min(a[0] for a in answers))


LOOK = """
import sys, time
began = time.perf_counter()
from sweeper.cli.show import status
from sweeper.store import open_store, studies
import rich.table, sweeper.cli.printing
imported, imported_cpu = time.perf_counter(), time.process_time()
status(study=sys.argv[2], store=sys.argv[1], json_=True)
own, own_cpu = time.perf_counter() - imported, time.process_time() - imported_cpu
print(imported - began, own, own_cpu, file=sys.stderr)
"""


def look(url: str, name: str, times: int) -> str:
    """What `sweeper status STUDY` costs in new processes: imports, and its own work."""
    found: list[list[float]] = []
    for _ in range(times):
        said = subprocess.run(
            [sys.executable, "-c", LOOK, url, name], capture_output=True, text=True, check=True
        )
        found.append([float(part) for part in said.stderr.strip().splitlines()[-1].split()])
        json.loads(said.stdout)
    imports, own, cpu = (spread([each[place] for each in found]) for place in range(3))
    return f"own work {own}, of CPU {cpu}; imports {imports}"


@contextmanager
def databases(wanted: list[str]) -> Iterator[dict[str, str]]:
    """URLs of fresh databases by kind; the PostgreSQL server ends with the context."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        urls = {}
        if "sqlite" in wanted:
            urls["sqlite"] = f"sqlite:///{folder}/store.db"
        if "postgresql" in wanted:
            import pgserver

            server = pgserver.get_server(Path(folder) / "postgres")
            stack.callback(server.cleanup)
            made = sqlalchemy.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
            urls["postgresql"] = made.render_as_string(hide_password=False)
        yield urls


def spread(values: list[float], unit: str = "s") -> str:
    return f"{statistics.median(values):.2f} {unit} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--trials", nargs="+", type=int, default=[0, 1000, 10_000])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--share", type=int, default=4, help="trials that each worker ends")
    parser.add_argument("--epochs", type=int, default=5, help="reports of each trial")
    parser.add_argument(
        "--claims", type=int, default=320, help="trials claimed for claims a second"
    )
    parser.add_argument("--looks", type=int, default=3, help="repetitions of `sweeper status`")
    parser.add_argument("--enqueue", type=int, default=1000, help="trials waiting at a status")
    parser.add_argument("--quick", action="store_true", help="a form that takes seconds")
    options = parser.parse_args()
    if options.quick:
        options.databases, options.trials, options.workers = ["sqlite"], [0, 200], [1, 2]
        options.share, options.claims, options.looks, options.epochs = 2, 20, 1, 2
        options.enqueue = 50
    print(f"{cpu_name()}, {os.cpu_count()} cores, {platform.platform()}; {versions()}")
    print(f"{datetime.now():%Y-%m-%d}, load average {os.getloadavg()[0]:.1f}")
    print("milliseconds: wall time, median / 95th percentile / CPU time, median")
    with databases(options.databases) as urls:
        for kind, url in urls.items():
            for trials in options.trials:
                measure(kind, url, trials, options)


def measure(kind: str, url: str, trials: int, options: argparse.Namespace) -> None:
    """Everything about one length of history on one database."""
    for workers in options.workers:
        found = measure_workers(url, trials, workers, options.share, options.epochs)
        claims = measure_claims(url, trials, workers, options.claims)
        line = {"claims_per_s": round(claims, 1), **found}
        print(
            f"{kind} "
            + ", ".join(
                f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
                for key, value in line.items()
            ),
            flush=True,
        )
    store = open_store(url)
    name = f"l{uuid.uuid4().hex[:8]}"
    _, enqueue_s = seeded(store, name, trials, options.enqueue)
    store.close()
    said = look(url, name, options.looks)
    print(
        f"{kind} history {trials}: enqueueing {options.enqueue} trials took {enqueue_s:.2f} s of "
        f"CPU; status of them all: {said}",
        flush=True,
    )


if __name__ == "__main__":
    main()

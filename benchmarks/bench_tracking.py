"""What the tracker costs: a `log` call, metrics a second, and an hour without MLflow.

With a real spool and a real MLflow server (SQLite), everything that a worker says of its trials:

1. what a `log` call costs the thread that trains, with the server there and with it away;
2. how many metrics a second reach MLflow, through the spool;
3. an hour's worth of metrics while MLflow is down: 360 trials of 10 s and 30 epochs each. What they
   cost is CPU time: that of all the calls, and that of the thread which tries the server again and
   again, watched for a minute and taken for sixty. Then the server comes back, and what arrives is
   counted in MLflow, every run and every point;
4. what small training steps lose beside the sending of a cohort of 64 that ends an epoch four times
   a second, with the thread's rest after each sending and without.

CPU time, because training and the sending thread share one interpreter: what one takes the other
lacks. It also means the same on a busy machine.

    python benchmarks/bench_tracking.py             # minutes
    python benchmarks/bench_tracking.py --quick     # under a minute, most of it the server's start
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from sweeper.measurement import EPOCH_METRICS
from sweeper.provenance import cpu_name, versions
from sweeper.settings import RUN_KEY_TAG, Settings, run_key
from sweeper.tracking import LocalServer, RunStart, SpoolTracker, spool
from sweeper.tracking.history import records

HOUR_S = 3600.0
PARAMS = {f"section.parameter_{index}": index / 7 for index in range(40)}


def metrics_of(epoch: int) -> dict[str, float]:
    return {name: epoch + place / 10 for place, name in enumerate(EPOCH_METRICS)}


def begin_trial(tracker: SpoolTracker, study: str, number: int) -> int:
    """What a worker says of a trial that begins; milliseconds since the epoch."""
    key, now_ms = run_key(study, number), time.time_ns() // 1_000_000
    tracker.start(
        RunStart(
            key=key,
            experiment=study,
            name=f"{number:04d}",
            start_time_ms=now_ms,
            params=PARAMS,
            tags={RUN_KEY_TAG: key},
        )
    )
    return now_ms


def say_trial(tracker: SpoolTracker, study: str, number: int, epochs: int) -> list[float]:
    """All that a worker says of one trial; microseconds of thread CPU time of each `log`."""
    key, spent = run_key(study, number), []
    now_ms = begin_trial(tracker, study, number)
    for epoch in range(1, epochs + 1):
        metrics = metrics_of(epoch)
        began = time.thread_time_ns()
        tracker.log(key, metrics, epoch, now_ms + epoch)
        spent.append((time.thread_time_ns() - began) / 1000)
    tracker.end(key, status="FINISHED", end_time_ms=now_ms + epochs + 1)
    return spent


def spread(values: Sequence[float]) -> str:
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"median {statistics.median(ordered):.0f}, 99th percentile {high:.0f}"


def arrived(settings: Settings, study: str) -> tuple[int, int]:
    """Runs and points that MLflow has of a study."""
    found = records(settings, study, list(EPOCH_METRICS))
    points = sum(len(series) for run in found.values() for series in run.history.values())
    return len(found), points


def check(settings: Settings, study: str, trials: int, epochs: int) -> str:
    runs, points = arrived(settings, study)
    wanted = trials * epochs * len(EPOCH_METRICS)
    if (runs, points) != (trials, wanted):
        raise SystemExit(
            f"MLflow must have {trials} runs and {wanted} points of {study}, but it has "
            f"{runs} and {points}"
        )
    return f"all {points:,} points of {runs} runs are in MLflow"


def throughput(settings: Settings, address: str, trials: int, epochs: int) -> None:
    with SpoolTracker(settings.spool, address, writer="throughput") as tracker:
        began = time.perf_counter()
        spent = [us for n in range(trials) for us in say_trial(tracker, "throughput", n, epochs)]
        said_s = time.perf_counter() - began
        if left := tracker.flush(1800):
            raise SystemExit(f"{left} records have not arrived in half an hour")
        took_s = time.perf_counter() - began
    points = trials * epochs * len(EPOCH_METRICS)
    print(f"log, server there: {spread(spent)} µs of CPU ({len(spent)} calls)")
    print(
        f"through the spool: {points:,} points in {trials} runs, said in {said_s:.1f} s, arrived "
        f"after {took_s:.1f} s: {points / took_s:.0f} a second; "
        + check(settings, "throughput", trials, epochs),
        flush=True,
    )


def idle_cpu_s(seconds: float) -> float:
    """CPU seconds of this process while it only waits: those of the sending thread."""
    began = time.process_time()
    time.sleep(seconds)
    return time.process_time() - began


def outage(
    settings: Settings, server: LocalServer, address: str, options: argparse.Namespace
) -> None:
    trials, epochs, watched_s = options.trials, options.epochs, options.watched
    server.stop()
    tracker = SpoolTracker(settings.spool, address, writer="outage")
    began, began_cpu = time.perf_counter(), time.process_time()
    spent = [us for n in range(trials) for us in say_trial(tracker, "outage", n, epochs)]
    said_s, said_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    idle_s = idle_cpu_s(watched_s)
    hour_idle_s = idle_s / watched_s * HOUR_S
    points = trials * epochs * len(EPOCH_METRICS)
    print(f"log, server away: {spread(spent)} µs of CPU ({len(spent)} calls)")
    print(
        f"an hour without MLflow: {points:,} points in {trials} runs took {said_cpu_s:.2f} s of "
        f"CPU to say ({said_s:.2f} s of wall time), trying the server again {hour_idle_s:.2f} s "
        f"an hour ({idle_s * 1000:.0f} ms in {watched_s:.0f} s): together "
        f"{(said_cpu_s + hour_idle_s) / HOUR_S:.4%} of an hour",
        flush=True,
    )
    size = sum(file.stat().st_size for file in settings.spool.rglob("*") if file.is_file())
    if server.ensure() != address:
        raise SystemExit("the server must come back where it was")
    began = time.perf_counter()
    if left := tracker.flush(1800):
        raise SystemExit(f"{left} records have not arrived in half an hour")
    took_s = time.perf_counter() - began
    tracker.close()
    print(
        f"after the outage: {size / 2**20:.1f} MiB of spool arrived within {took_s:.1f} s, "
        f"{points / took_s:.0f} points a second; " + check(settings, "outage", trials, epochs),
        flush=True,
    )


def steps_a_second(seconds: float, said: Callable[[int], object]) -> float:
    """Steps of a small network on one thread; ``said`` is called four times a second."""
    network = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    images, labels = torch.randn(128, 784), torch.randint(0, 10, (128,))
    began, steps, epoch = time.perf_counter(), 0, 0
    while (now := time.perf_counter() - began) < seconds:
        if now > epoch * 0.25:
            epoch += 1
            said(epoch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        steps += 1
    return steps / seconds


def beside(
    settings: Settings, address: str, *, runs: int, seconds: float, repetitions: int
) -> None:
    """Steps a second while ``runs`` are sent, as a share of those while nothing is."""
    torch.set_num_threads(1)
    spool._REST_SHARE = 1.0  # type: ignore[misc]  # as in a worker that has been at it for long
    shares: dict[float, list[float]] = {spool._REST: [], 0.0: []}
    with SpoolTracker(settings.spool, address, writer="beside") as tracker:
        for number in range(runs):
            begin_trial(tracker, "beside", number)
        tracker.flush(300)
        steps_a_second(1.0, lambda _: None)
        first = 0
        for _ in range(repetitions):
            for rest in shares:
                spool._REST = rest  # type: ignore[misc]  # what is compared
                alone = steps_a_second(seconds / 4, lambda _: None)

                def said(epoch: int, first: int = first) -> None:
                    for number in range(runs):
                        key, at = run_key("beside", number), first + epoch
                        tracker.log(key, metrics_of(at), at, time.time_ns() // 1_000_000)

                found = steps_a_second(seconds, said)
                first += 1000
                tracker.flush(300)
                shares[rest].append(found / alone)
    for rest, found in shares.items():
        print(
            f"steps beside {runs} runs in training, rest {rest:g} times as long as the sending: "
            f"{statistics.median(found):.1%} of those alone ({min(found):.1%} to {max(found):.1%})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=360, help="an hour's, 10 s each")
    parser.add_argument("--epochs", type=int, default=30, help="of each trial")
    parser.add_argument("--watched", type=float, default=60.0, help="seconds of waiting watched")
    parser.add_argument("--beside", type=float, default=20.0, help="seconds of steps at a time")
    parser.add_argument("--quick", action="store_true", help="a form that takes under a minute")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.epochs, options.watched, options.beside = 4, 5, 2.0, 1.0
    print(f"{cpu_name()}, {os.cpu_count()} cores, {platform.platform()}; {versions()}")
    print(f"{datetime.now():%Y-%m-%d}, load average {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.resolve(home=Path(folder) / "home", environment={})
        with LocalServer(settings) as server:
            address = server.ensure()
            throughput(settings, address, max(2, options.trials // 10), options.epochs)
            outage(settings, server, address, options)
            few, once = (8, 1) if options.quick else (64, 3)
            beside(settings, address, runs=few, seconds=options.beside, repetitions=once)


if __name__ == "__main__":
    main()

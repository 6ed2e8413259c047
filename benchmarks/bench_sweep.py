"""A whole sweep by sweeper and by the plain way, in turn, in one run.

The plain way is `plain_sweep.py`: Optuna, a DataLoader and MLflow's callback, in as many processes
as there are jobs, as a tutorial writes it; `--plain-threads 1` is the same by somebody who knows
that torch's threads get in each other's way. Its MLflow server runs before its clock does, and it
writes no report; sweeper's time is that of `sweeper launch`, server and report included. Both train
every point of the study's grid, with the same models, optimizers and epochs.

    python benchmarks/bench_sweep.py studies/mixer_mnist_init.yaml --data ~/.cache/sweeper/data \\
        --set train.epochs=2 --set data.limit=12000 --set data.validation=1000 --jobs 2

Where the plain way would take too long, `--plain-seconds 60` ends it after a minute, and its time
is reckoned from the epochs that it logged: until each process logged its first one, and then as
many as are left at the pace of those that followed. Reading the test set is not counted. sweeper
always trains everything.

    python benchmarks/bench_sweep.py benchmarks/sweep_mlp.yaml --data ~/.cache/sweeper/data \\
        --workers 1 --jobs 16 --plain-threads 1 --plain-seconds 60 --repetitions 1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
from mlflow import MlflowClient

from sweeper.launchers import automatic_workers
from sweeper.provenance import cpu_name, versions
from sweeper.settings import Settings
from sweeper.store.tickets import tickets
from sweeper.study.parse import load
from sweeper.study.spec import StudySpec
from sweeper.tracking import LocalServer

METRIC = "val_accuracy"
PLAIN = Path(__file__).with_name("plain_sweep.py")
_ATTEMPTS = 3


def by_sweeper(options: argparse.Namespace, home: Path) -> tuple[float, float]:
    """Seconds of the whole launch, and the best validation accuracy."""
    argv = [sys.executable, "-m", "sweeper", "launch", str(options.study), "--json"]
    argv += [f"--set={each}" for each in options.overrides]
    argv += ["--workers", str(options.workers or options.jobs), "--home", str(home)]
    environment = {**os.environ, "SWEEPER_DATA": str(options.data)}
    began = time.perf_counter()
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"sweeper ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return seconds, json.loads(done.stdout)["best"]["values"][0]


class GivenTwiceError(Exception):
    """Optuna gave one waiting trial to two processes, and one of them could not end it."""


def by_hand(options: argparse.Namespace, home: Path, threads: int | None) -> tuple[float, float]:
    """:func:`by_hand_once`, again where Optuna gives a trial to two processes."""
    for attempt in range(_ATTEMPTS):
        try:
            return by_hand_once(options, home.with_name(f"{home.name}-{attempt}"), threads)
        except GivenTwiceError as error:
            print(f"the plain way once more: {error.__doc__} ({error})", flush=True)
    raise SystemExit(f"the plain way did not end in {_ATTEMPTS} attempts")


def by_hand_once(
    options: argparse.Namespace, home: Path, threads: int | None
) -> tuple[float, float]:
    """Seconds until the last of the plain processes has ended, and the best accuracy.

    With ``--plain-seconds`` both are those of a sweep that was broken off: the seconds are
    reckoned, and the accuracy is NaN.
    """
    home.mkdir()
    spec = load(options.study, options.overrides)
    count = len(tickets(spec, with_reference=False))
    storage = f"sqlite:///{home}/plain.db"
    with LocalServer(Settings.resolve(home=home)) as server:
        tracker = server.ensure()
        MlflowClient(tracker).create_experiment(spec.name)  # two processes would both try
        began = time.perf_counter()
        study = optuna.create_study(study_name=spec.name, storage=storage, direction="maximize")
        for index in range(count):
            study.enqueue_trial({"index": index})
        argv = [sys.executable, str(PLAIN), str(options.study), "--data", str(options.data)]
        argv += [f"--set={each}" for each in options.overrides]
        argv += ["--store", storage, "--tracker", tracker, "--loaders", str(options.loaders)]
        argv += ["--threads", str(threads)] if threads else []
        shares = [
            count // options.jobs + (job < count % options.jobs) for job in range(options.jobs)
        ]
        logs = [home / f"plain-{job}.log" for job in range(options.jobs)]
        started = [
            subprocess.Popen(
                [*argv, "--trials", str(share)], stdout=log.open("w"), stderr=subprocess.STDOUT
            )
            for share, log in zip(shares, logs, strict=True)
            if share
        ]
        if options.plain_seconds:
            try:
                return reckoned(options, tracker, spec, count, len(started)), float("nan")
            finally:
                for process in started:
                    process.kill()
                    process.wait()
        codes = [process.wait() for process in started]
        seconds = time.perf_counter() - began
    for code, log in zip(codes, logs, strict=False):
        last = log.read_text().strip().splitlines()[-1:] if code else []
        if any("Cannot tell a" in line for line in last):
            raise GivenTwiceError(*last)
        if code:
            raise SystemExit(f"the plain way ended with {code}:\n{log.read_text()[-2000:]}")
    return seconds, study.best_value


def reckoned(
    options: argparse.Namespace, tracker: str, spec: StudySpec, count: int, jobs: int
) -> float:
    """Seconds that the plain way would take, from those epochs that it logs in its time."""
    began = time.time()
    time.sleep(options.plain_seconds)
    client = MlflowClient(tracker)
    experiment = client.get_experiment_by_name(spec.name)
    assert experiment is not None
    ends = [
        [
            each.timestamp / 1000 - began
            for each in client.get_metric_history(run.info.run_id, METRIC)
        ]
        for run in client.search_runs([experiment.experiment_id], max_results=1000)
    ]
    ends = sorted((sorted(times) for times in ends if len(times) > 1), key=min)[:jobs]
    logged = sum(map(len, ends))
    if len(ends) < jobs:
        raise SystemExit(f"{len(ends)} of {jobs} jobs logged two epochs: give --plain-seconds more")
    first = statistics.mean(times[0] for times in ends)
    pace = statistics.mean((times[-1] - times[0]) / (len(times) - 1) for times in ends)
    values = tickets(spec, with_reference=False)[0].values or {}
    epochs = count * spec.trial_config(values).train.epochs / jobs
    print(
        f"plain way broken off after {options.plain_seconds:.0f} s: {logged} epochs logged, the "
        f"first after {first:.1f} s, then one of each of {jobs} jobs in {pace:.2f} s; "
        f"{epochs:.0f} are asked of each",
        flush=True,
    )
    return first + (epochs - 1) * pace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="a study with a grid")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=automatic_workers(1))
    parser.add_argument("--loaders", type=int, default=0, help="DataLoader processes of each job")
    parser.add_argument("--plain-threads", type=int, help="torch threads of a plain process")
    parser.add_argument("--workers", type=int, help="of sweeper; as many as jobs by default")
    parser.add_argument("--plain-seconds", type=float, help="break the plain way off then")
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    count = len(tickets(load(options.study, options.overrides), with_reference=False))
    print(f"{cpu_name()}, {platform.platform()}; {versions()}")
    print(f"{options.study.name} {options.overrides}: {count} trials, {options.jobs} jobs")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(options.repetitions):
            place = Path(folder)
            ours, our_best = by_sweeper(options, place / f"sweeper-{repetition}")
            print(f"{repetition}: sweeper {ours:.1f} s", flush=True)
            plain, plain_best = by_hand(
                options, place / f"plain-{repetition}", options.plain_threads
            )
            ratios.append(plain / ours)
            print(
                f"{repetition}: sweeper {ours:.1f} s ({3600 * count / ours:.0f} trials an hour, "
                f"best {our_best:.4f}), plain {plain:.1f} s ({3600 * count / plain:.0f} trials an "
                f"hour, best {plain_best:.4f}), ratio {plain / ours:.2f}",
                flush=True,
            )
    low, high = min(ratios), max(ratios)
    print(f"ratio: median {statistics.median(ratios):.2f} (min {low:.2f}, max {high:.2f})")


if __name__ == "__main__":
    main()

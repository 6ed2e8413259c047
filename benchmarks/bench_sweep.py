"""A whole sweep by sweeper and by the plain way, in turn, in one run.

The plain way is `plain_sweep.py`: Optuna, a DataLoader and MLflow's callback, in as many processes
as there are jobs, as a tutorial writes it; `--plain-threads 1` is the same by somebody who knows
that torch's threads get in each other's way. Its MLflow server runs before its clock does, and it
writes no report; sweeper's time is that of `sweeper launch`, server and report included. Both train
every point of the study's grid, with the same models, optimizers and epochs.

    python benchmarks/bench_sweep.py studies/mixer_mnist_init.yaml --data ~/.cache/sweeper/data \\
        --set train.epochs=2 --set data.limit=12000 --set data.validation=1000 --jobs 2
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
from sweeper.tracking import LocalServer

PLAIN = Path(__file__).with_name("plain_sweep.py")


def by_sweeper(options: argparse.Namespace, home: Path) -> tuple[float, float]:
    """Seconds of the whole launch, and the best validation accuracy."""
    argv = [sys.executable, "-m", "sweeper", "launch", str(options.study), "--json"]
    argv += [f"--set={each}" for each in options.overrides]
    argv += ["--workers", str(options.jobs), "--home", str(home)]
    environment = {**os.environ, "SWEEPER_DATA": str(options.data)}
    began = time.perf_counter()
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"sweeper ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return seconds, json.loads(done.stdout)["best"]["values"][0]


def by_hand(options: argparse.Namespace, home: Path, threads: int | None) -> tuple[float, float]:
    """Seconds until the last of the plain processes has ended, and the best accuracy."""
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
        codes = [process.wait() for process in started]
        seconds = time.perf_counter() - began
    for code, log in zip(codes, logs, strict=False):
        if code:
            raise SystemExit(f"the plain way ended with {code}:\n{log.read_text()[-2000:]}")
    return seconds, study.best_value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="a study with a grid")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=automatic_workers(1))
    parser.add_argument("--loaders", type=int, default=0, help="DataLoader processes of each job")
    parser.add_argument("--plain-threads", type=int, help="torch threads of a plain process")
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

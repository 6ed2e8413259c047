"""Break a sweep at random, by a seeded plan, and hold it to account afterwards.

``scripts/chaos`` runs it by hand, ``test_chaos.py`` a short form. Killed with SIGKILL are workers,
the template that forks them, ``sweeper launch``, the MLflow server with all its processes, and
PostgreSQL, each as likely as any other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from cli.conftest import Sweeper, templates
from servers.postgres import Postgres
from small_data import write_idx_family

from sweeper.settings import Settings
from sweeper.store import Standing, open_store, standing, studies, tickets
from sweeper.store import attributes as attr
from sweeper.study.spec import StudySpec
from sweeper.tracking import MemoryTracker
from sweeper.worker import Worker

_RESUMED = re.compile(r"trial (\d+) goes on after epoch (\d+)")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is broken how often."""

    trials: int
    workers: int
    seed: int
    every_s: float
    kills: int | None = None
    limit_s: float = 600
    epochs: int = 12

    def study(self) -> dict[str, Any]:
        return {
            "name": "chaos",
            "data": {"name": "mnist", "validation": 60},
            "model": {"name": "mlp", "width": 8, "layers": 1, "dropout": 0.1},
            "train": {"epochs": self.epochs, "batch_size": 4},
            "search": {"trials": self.trials, "sampler": "random", "seed": self.seed},
            "parameters": {"optimizer.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": True}},
            "faults": {
                "heartbeat_s": 1,
                "lost_after_s": 6,
                "retries": 1000,
                "checkpoint_s": 0,
            },
        }


@dataclass(kw_only=True)
class Account:
    """What was broken and what came of it. ``wrong`` is empty where nothing was lost."""

    killed: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    attempts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    begun_anew: int = 0
    repeated: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def table(self) -> str:
        """For people."""
        killed = ", ".join(f"{kind} {count}" for kind, count in sorted(self.killed.items()))
        repeated = ", ".join(
            f"{epochs} epochs: {count}" for epochs, count in sorted(self.repeated.items())
        )
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        lines = [
            f"killed                  {sum(self.killed.values())} ({killed})",
            f"launches                {self.launches}",
            f"trials of the store     {self.attempts} ({outcomes})",
            f"went on from checkpoint {self.resumed}",
            f"lost, began anew        {self.begun_anew}",
            f"repeated after a loss   {repeated or 'nothing'}",
            f"seconds                 {self.seconds:.0f}",
            f"wrong                   {len(self.wrong)}",
            *(f"  {line}" for line in self.wrong),
        ]
        return "\n".join(lines)


class Chaos:
    """One broken sweep in ``folder``."""

    def __init__(self, folder: Path, plan: Plan, postgres: Postgres | None = None) -> None:
        self._sweeper = Sweeper(folder)
        self._plan = plan
        self._postgres = postgres
        self._random = random.Random(plan.seed)
        self._url = postgres.url if postgres else f"sqlite:///{folder}/.sweeper/optuna.db"
        self._launch: subprocess.Popen[bytes] | None = None
        self.account = Account()

    def run(self) -> Account:
        """Break, wait until the sweep is over all the same, and look what came of it."""
        began = time.monotonic()
        write_idx_family(self._sweeper.folder / "data/MNIST/raw", train=300, test=60)
        file = self._sweeper.write(**self._plan.study())
        try:
            self._until_over(file, began + self._plan.limit_s)
        finally:
            self._end_launch()
        self._sweeper.run("sync", "--store", self._url)
        self.account.seconds = time.monotonic() - began
        self._check()
        return self.account

    def _until_over(self, file: Path, until: float) -> None:
        plan, account = self._plan, self.account
        due = time.monotonic() + plan.every_s
        while time.monotonic() < until:
            if self._launch is None or self._launch.poll() is not None:
                if self._launch is not None and self._launch.returncode == 0:
                    return
                self._start(file)
            enough = plan.kills is not None and sum(account.killed.values()) >= plan.kills
            if time.monotonic() > due and not enough:
                due = time.monotonic() + plan.every_s * self._random.uniform(0.5, 1.5)
                self._kill()
            time.sleep(0.1)
        account.wrong.append(f"the sweep is not over after {plan.limit_s:.0f} s")

    def _start(self, file: Path) -> None:
        self.account.launches += 1
        with (self._sweeper.folder / "launch.log").open("ab") as log:
            words = ("launch", str(file), "--workers", str(self._plan.workers))
            self._launch = subprocess.Popen(
                [sys.executable, "-m", "sweeper", *words, "--store", self._url],
                cwd=self._sweeper.folder,
                env=self._sweeper.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _kill(self) -> None:
        """Kill one of all that run."""
        victims: list[tuple[str, Callable[[], object]]] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._launch is not None and self._launch.poll() is None:
                victims.append(("launch", self._launch.kill))
                for template in templates(psutil.Process(self._launch.pid)):
                    victims.append(("template", template.kill))
                    victims += [("worker", worker.kill) for worker in template.children()]
        with contextlib.suppress(OSError, ValueError):
            known = json.loads((self._sweeper.folder / ".sweeper/server.json").read_text())
            if psutil.pid_exists(known["pid"]):
                victims.append(("mlflow", partial(os.killpg, known["pid"], signal.SIGKILL)))
        if self._postgres is not None:
            victims.append(("postgres", self._restart_postgres))
        drawn = self._random.randrange(max(len(victims), self._plan.workers + 3))
        if drawn < len(victims):  # or it is one that does not run at this moment
            kind, kill = victims[drawn]
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                kill()
                self.account.killed[kind] += 1

    def _restart_postgres(self) -> None:
        if self._postgres is not None:
            self._postgres.kill()
            time.sleep(self._random.uniform(0, 2))
            self._postgres.start()

    def _end_launch(self) -> None:
        if self._launch is not None and self._launch.poll() is None:
            self._launch.kill()
            self._launch.wait()

    def _check(self) -> None:
        now, account = self._standing(), self.account
        account.attempts = len(now.rows)
        account.outcomes = Counter(row.outcome or "preempted" for row in now.rows)
        if now.counts["complete"] != self._plan.trials or now.budget != self._plan.trials:
            account.wrong.append(f"{self._plan.trials} trials must be complete: {now.counts}")
        origins = Counter(row.origin for row in now.rows if row.state == "complete")
        account.wrong += [f"trial {n} ended {c} times" for n, c in origins.items() if c > 1]
        for row in now.rows:
            if row.state == "complete" and sorted(row.history) != [
                *range(1, self._plan.epochs + 1)
            ]:
                account.wrong.append(f"trial {row.number} has the epochs {sorted(row.history)}")
        self._count_repeats()
        said = self._sweeper.start("doctor", "--study", "chaos", "--store", self._url)
        out, err = said.communicate(timeout=300)
        if said.returncode:
            account.wrong += [*out.splitlines(), *err.splitlines()]
        whole = self._without_faults()
        for left, right in zip(self._results(now), self._results(whole), strict=False):
            if left != right:
                account.wrong.append(f"trial {left[0]} gave {left[1:]}, without faults {right[1:]}")
        best = self._sweeper.folder / ".sweeper/checkpoints"
        left_over = list(best.rglob("*.ckpt")) if best.exists() else []
        account.wrong += [f"{file} was left behind" for file in left_over]

    @staticmethod
    def _results(now: Standing) -> list[tuple[Any, ...]]:
        rows = sorted((row for row in now.rows if row.state == "complete"), key=lambda r: r.origin)
        return [
            (r.origin, r.values, r.metrics["val_loss"], r.metrics["test_accuracy"]) for r in rows
        ]

    def _standing(self) -> Standing:
        store = open_store(self._url)
        try:
            return standing(store, studies.load(store, "chaos"))
        finally:
            store.close()

    def _count_repeats(self) -> None:
        """From what workers logged when they went on, and what the lost trials had reported."""
        went_on: dict[int, int] = {}
        for log in sorted((self._sweeper.folder / ".sweeper/logs/chaos").glob("*.log")):
            for number, epoch in _RESUMED.findall(log.read_text(errors="replace")):
                self.account.resumed += 1
                went_on[int(number)] = min(int(epoch), went_on.get(int(number), 10**6))
        store = open_store(self._url)
        trials = studies.load(store, "chaos").study.get_trials(deepcopy=False)
        store.close()
        for trial in trials:
            before = trial.user_attrs.get(attr.RETRY_OF)
            if before is None:
                continue
            reached = trials[before].last_step or 0
            if trial.number not in went_on:
                self.account.begun_anew += 1
            self.account.repeated[max(0, reached - went_on.get(trial.number, 0))] += 1

    def _without_faults(self) -> Standing:
        folder = self._sweeper.folder / "without faults"
        settings = Settings.resolve(home=folder, environment=self._sweeper.environment)
        store = open_store(settings.store_url)
        spec = StudySpec.model_validate(self._plan.study())
        with store.exclusively():
            study = studies.create(store, spec)
            if study is None:
                raise ValueError("the study is there already")
            tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=False))
        Worker(store=store, tracker=MemoryTracker(), settings=settings, study="chaos").run()
        found = standing(store, study)
        store.close()
        return found


def main() -> None:
    """The long form, by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two kills")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for all of it")
    parser.add_argument("--postgres", action="store_true", help="on PostgreSQL, killed as well")
    asked = parser.parse_args()
    plan = Plan(
        trials=asked.trials,
        workers=asked.workers,
        seed=asked.seed,
        every_s=asked.every,
        limit_s=asked.limit,
    )
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    (folder / "home").mkdir()
    postgres = Postgres(folder / "postgres") if asked.postgres else None
    try:
        account = Chaos(folder / "home", plan, postgres).run()
    finally:
        if postgres is not None:
            postgres.close()
    sys.stdout.write(f"{plan}\n{account.table()}\nkept in {folder}\n")
    sys.exit(1 if account.wrong else 0)


if __name__ == "__main__":
    main()

"""A study on two SLURM nodes whose jobs reach their time limit and are preempted.

``scripts/time-limit`` runs it by hand and prints the account: with SLURM's own settings, by which a
job that is queued again waits two minutes, and a limit of three minutes. It takes about ten. The
short form, among the tests, lowers the limit of a job that runs. Both need root, slurm-wlm, munge
and the wheel pgserver.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import own_models
import sqlalchemy
from cli.conftest import Sweeper
from launchers.slurm_cluster import GPUS, NODES, SlurmCluster, missing, until
from servers.postgres import Postgres

from sweeper.controller import prepare
from sweeper.service.agreement import differences
from sweeper.settings import Settings, group_name
from sweeper.store import Standing, open_store, standing, studies
from sweeper.study.spec import StudySpec
from sweeper.tracking import LocalServer, MemoryTracker
from sweeper.worker import Worker

NAME = "two-nodes"
_RESUMED = re.compile(r"trial (\d+) goes on after epoch (\d+)")
_GIVEN_BACK = re.compile(r"trial (\d+) goes back to the queue")
_NEAR = "the time limit is near"
_PREEMPTED = "DUE TO PREEMPTION"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``time_min`` is every job's limit.

    ``lowered``: the job on the first node gets another limit, so soon that SLURM signals it when
    it looks next, which it does every 30 s; without, a limit is waited for.
    """

    trials: int
    epochs: int
    time_min: int
    requeue_s: int
    lowered: bool = False
    over_s: float = 900.0

    def study(self) -> dict[str, Any]:
        return {
            "name": NAME,
            "data": {"name": "digits", "limit": 300},
            "model": {"name": "own_models:unhurried"},
            "train": {"epochs": self.epochs, "batch_size": 50},
            "search": {"trials": self.trials, "sampler": "random", "seed": 0},
            "parameters": {"optimizer.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": True}},
            "resources": {
                "workers": len(NODES),
                "gpus_per_worker": GPUS,  # a node each
                "slurm": {"time": self.time_min, "partition": "low"},
            },
            "faults": {"heartbeat_s": 2, "lost_after_s": 20, "grace_s": 10, "checkpoint_s": 0},
        }


@dataclass(kw_only=True)
class Account:
    """What happened to the jobs and the trials. ``wrong`` is empty where nothing was lost."""

    moments: list[str] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)
    limits: int = 0
    preemptions: int = 0
    given_back: int = 0
    resumed: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    wrong: list[str] = field(default_factory=list)

    def table(self) -> str:
        """For people."""
        requeued = ", ".join(f"{job}: {count}" for job, count in sorted(self.restarts.items()))
        return "\n".join(
            [
                *self.moments,
                f"queued again by SLURM    {requeued}",
                f"  at the time limit      {self.limits}",
                f"  by a preemption        {self.preemptions}",
                f"trials given back        {self.given_back}",
                *(f"  {line}" for line in self.resumed),
                f"trials                   {self.counts} in {self.rows} rows of the store",
                f"wrong                    {len(self.wrong)}",
                *(f"  {line}" for line in self.wrong),
            ]
        )


@contextlib.contextmanager
def _postgres(log: Path) -> Iterator[str]:
    """The URL of an empty database that other machines could reach."""
    host = socket.gethostname()
    server = Postgres(log, address=socket.gethostbyname(host))
    with contextlib.closing(server):
        url = sqlalchemy.make_url(server.create("sweeper"))
        yield url.set(host=host).render_as_string(hide_password=False)


class TwoNodes:
    """One such study, with its servers, in ``folder``."""

    def __init__(self, folder: Path, cluster: SlurmCluster, plan: Plan) -> None:
        self._sweeper = Sweeper(folder)
        self._cluster = cluster
        self._plan = plan
        self._began = time.monotonic()
        self._environment: dict[str, str] = {}
        self._results: list[tuple[Any, ...]] = []
        self.account = Account()

    @property
    def _log(self) -> Path:
        return self._sweeper.folder / "launch.log"

    @property
    def _settings(self) -> Settings:
        return Settings.resolve(environment=self._environment)

    def _at(self, moment: str) -> None:
        line = f"{time.monotonic() - self._began:6.1f} s  {moment}"
        self.account.moments.append(line)

    def run(self) -> Account:
        """Launch the study, let SLURM interrupt its jobs, and hold the end to account."""
        folder = self._sweeper.folder
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(_postgres(folder / "postgres.log"))
            uri = stack.enter_context(_mlflow(folder / "mlflow"))
            self._environment = {
                **self._sweeper.environment,
                **self._cluster.environment,
                "SWEEPER_STORE": url,
                "MLFLOW_TRACKING_URI": uri,
                "SWEEPER_HOME": str(folder / ".sweeper"),
            }
            launch = self._launch()
            stack.callback(_end, launch)
            self._interrupt(launch)
            if code := launch.wait(self._plan.over_s):
                said = self._log.read_text()[-3000:]
                raise RuntimeError(f"the launch ended with {code}:\n{said}")
            self._at("the launch has ended")
            self._check()
        return self.account

    def _launch(self) -> subprocess.Popen[bytes]:
        file = self._sweeper.write(**self._plan.study())
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "sweeper", "launch", file, "--launcher", "slurm"],
                cwd=self._sweeper.folder,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def _interrupt(self, launch: subprocess.Popen[bytes]) -> None:
        """One job on the first node reaches its limit, another on the second is preempted."""
        plan = self._plan

        def unless_over(condition: Callable[[], bool], what: str) -> None:
            def found() -> bool:
                if launch.poll() is not None:
                    said = self._log.read_text()[-3000:]
                    raise RuntimeError(f"the launch ended before {what}:\n{said}")
                return condition()

            until(found, timeout_s=plan.over_s)
            self._at(what)

        unless_over(lambda: len(self._in_the_middle()) == 2, "a trial is in training on each node")
        first = next(job for job, node in self._jobs().items() if node == NODES[0])
        if plan.lowered:
            soon_min = math.ceil((self._cluster.runs_s(first) + 40) / 60)
            unless_over(lambda: self._limit(first, soon_min), "its limit was lowered")
        else:
            unless_over(lambda: self._logged(_NEAR) >= 1, "a time limit was near")
            unless_over(lambda: NODES[1] in self._in_the_middle(), "a trial goes on")
        self._cluster.preempt(NODES[1])
        unless_over(lambda: self._logged(_PREEMPTED) >= 1, "a job was preempted")
        if plan.lowered:
            unless_over(lambda: self._logged(_NEAR) >= 1, "a time limit was near")
            unless_over(lambda: self._limit(first, plan.time_min), "its limit was raised again")
        unless_over(lambda: bool(self._resumed()), "a trial went on from its checkpoint")

    def _limit(self, job: str, minutes: int) -> bool:
        """Set a job's limit. False where SLURM does not do that now, as the job just ends."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
            return True
        return False

    def _jobs(self) -> Mapping[str, str]:
        """``JOB_INDEX`` → node of each job that runs."""
        found = self._cluster.states(group_name(self._environment["SWEEPER_STORE"], NAME))
        rows = [line.split() for line in found]
        return {row[0]: row[2] for row in rows if row[1] == "RUNNING"}

    def _in_the_middle(self) -> set[str]:
        """The nodes on which a trial has reported an epoch and lacks several."""
        try:
            rows = self._standing().rows
        except Exception:  # noqa: BLE001 - until the launch has made it, there is no such study
            return set()
        jobs = self._jobs()
        return {
            jobs["_".join(row.worker.split("-")[1:3])]
            for row in rows
            if row.state == "running"
            and row.worker
            and "_".join(row.worker.split("-")[1:3]) in jobs
            and 2 <= len(row.history) <= self._plan.epochs // 2
        }

    def _standing(self) -> Standing:
        store = open_store(self._settings.store_url)
        try:
            return standing(store, studies.load(store, NAME))
        finally:
            store.close()

    def _logs(self) -> str:
        files = sorted(self._settings.logs(NAME).glob("*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    def _logged(self, words: str) -> int:
        return self._logs().count(words)

    def _resumed(self) -> list[tuple[str, ...]]:
        return _RESUMED.findall(self._logs())

    def _check(self) -> None:
        now, account, plan = self._standing(), self.account, self._plan
        account.counts = {state: count for state, count in now.counts.items() if count}
        account.rows = len(now.rows)
        for file in self._settings.logs(NAME).glob("*.lives"):
            job = "_".join(file.stem.split("-")[1:])
            account.restarts[job] = self._cluster.restarts(job)
        account.limits, account.preemptions = self._logged(_NEAR), self._logged(_PREEMPTED)
        account.given_back = len(_GIVEN_BACK.findall(self._logs()))
        account.resumed = [
            f"trial {number} went on after epoch {epoch} of {plan.epochs}"
            for number, epoch in self._resumed()
        ]
        if now.counts["complete"] != plan.trials or now.budget != plan.trials:
            account.wrong.append(f"{plan.trials} trials must be complete: {now.counts}")
        origins = Counter(row.origin for row in now.rows if row.state == "complete")
        account.wrong += [f"trial {n} ended {c} times" for n, c in origins.items() if c > 1]
        account.wrong += [
            f"trial {row.number} has the epochs {sorted(row.history)}"
            for row in now.rows
            if row.state == "complete" and sorted(row.history) != [*range(1, plan.epochs + 1)]
        ]
        account.wrong += differences(now, self._settings)
        self._results = _results(now)
        checkpoints = Path(self._settings.checkpoints)
        left_over = [*checkpoints.rglob("*.ckpt")] if checkpoints.exists() else []
        account.wrong += [f"{file} was left behind" for file in left_over]

    def compare(self) -> None:
        """Train the same study here, undisturbed, and demand the same results to the last bit."""
        own_models.BATCH_S = 0.0
        settings = Settings.resolve(
            home=self._sweeper.folder / "undisturbed", environment=self._sweeper.environment
        )
        store = open_store(settings.store_url)
        prepared = prepare(store, StudySpec.model_validate(self._plan.study()))
        Worker(
            store=store,
            tracker=MemoryTracker(),
            settings=settings,
            study=NAME,
            allow_imports=True,
        ).run()
        undisturbed = _results(standing(store, prepared.study))
        store.close()
        for left, right in zip(self._results, undisturbed, strict=True):
            if left != right:
                self.account.wrong.append(f"{left} is {right} without SLURM")
        self._at("the same study was trained here, undisturbed, and compared")


def _results(now: Standing) -> list[tuple[Any, ...]]:
    rows = sorted((row for row in now.rows if row.state == "complete"), key=lambda r: r.origin)
    return [(r.origin, r.values, r.metrics["val_loss"], r.metrics["test_accuracy"]) for r in rows]


@contextlib.contextmanager
def _mlflow(home: Path) -> Iterator[str]:
    """An MLflow server under this machine's name, as other machines would call it."""
    host = socket.gethostname()
    before = os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS")
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = f"{host},{host}:*,127.0.0.1:*,localhost:*"
    try:
        with LocalServer(Settings.resolve(home=home, environment={})) as server:
            yield server.ensure().replace("127.0.0.1", host)
    finally:
        if before is None:
            del os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"]
        else:
            os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = before


def _end(launch: subprocess.Popen[bytes]) -> None:
    """End the launch, and with it its jobs."""
    if launch.poll() is None:
        launch.terminate()
        try:
            launch.wait(60)
        except subprocess.TimeoutExpired:
            launch.kill()
            launch.wait()


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Print the account; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--time", type=int, default=3, help="every job's limit in minutes")
    parser.add_argument("--requeue", type=int, default=120, help="a requeued job waits so long")
    parser.add_argument("--folder", type=Path, help="Where to work. [default: a temporary folder]")
    asked = parser.parse_args()
    if lack := missing():
        sys.exit(lack)
    signal.signal(signal.SIGTERM, _leave)  # what was started ends with this
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="two nodes "))
    folder.mkdir(exist_ok=True)
    plan = Plan(
        trials=asked.trials,
        epochs=asked.epochs,
        time_min=asked.time,
        requeue_s=asked.requeue,
        over_s=3000,
    )
    cluster = SlurmCluster(requeue_s=plan.requeue_s)
    try:
        cluster.start()
        study = TwoNodes(folder, cluster, plan)
        account = study.run()
    finally:
        cluster.close()
    sys.stdout.write(f"{plan}\n{account.table()}\nlogs: {folder}\n")
    sys.stdout.flush()
    study.compare()
    sys.stdout.write("\n".join([account.moments[-1], *account.wrong, ""]))
    sys.exit(bool(account.wrong))


if __name__ == "__main__":
    main()

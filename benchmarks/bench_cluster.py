"""Many workers on one PostgreSQL: no error, no trial twice, and how many connections that takes.

    python benchmarks/bench_cluster.py direct --workers 64 --trials 256
    python benchmarks/bench_cluster.py proxy --clients 500 --trials 1000

``direct``: so many worker processes, each the whole worker (claim, training of a tiny model that
sleeps for the rest of a second, a report an epoch, heartbeats, end) with a database session of its
own. They are forked from one process that has loaded torch, which saves their memory, and keep what
they would tell MLflow in memory.

``proxy``: so many clients, threads of a few processes, which do to the store what a worker does
(claim, draw, a report every third of a second, heartbeats, end) and train nothing, through the gRPC
proxy of a real ``sweeper controller``.

Both start a PostgreSQL server of their own (the wheel pgserver) with its default of 100
connections, and count the sessions that it has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sqlalchemy

from sweeper.errors import StoreUnreachableError
from sweeper.provenance import cpu_name, versions
from sweeper.settings import Settings
from sweeper.store import (
    Outcome,
    Store,
    StoredStudy,
    held,
    open_store,
    overview,
    queue,
    standing,
    studies,
    tickets,
    workers,
)
from sweeper.store.workers import Presence
from sweeper.study.spec import StudySpec

EPOCHS = 3
TRIAL_S = 1.0
_PROCESSES = 4


def spec(trials: int) -> StudySpec:
    """A study of one-second trials."""
    return StudySpec.model_validate(
        {
            "name": "many",
            "data": {"name": "digits", "limit": 200},
            "model": {"name": "bench_cluster:sleepy"},
            "train": {"epochs": EPOCHS, "batch_size": 200},
            "search": {"trials": trials, "sampler": "random"},
            "parameters": {"optimizer.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}},
            "faults": {"heartbeat_s": 5, "lost_after_s": 60, "checkpoint_every": 0},
        }
    )


def sleepy(classes: int) -> Any:
    """A linear model whose every training step sleeps its share of a second."""
    import torch

    class Sleepy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, classes)

        def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
            if self.training:
                time.sleep(TRIAL_S / EPOCHS)
            return self.head(x_NCHW.flatten(1))

    return Sleepy()


class Sessions(threading.Thread):
    """Counts the server's sessions, a few times a second."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        self.counts: list[int] = []
        self.ended = threading.Event()

    def run(self) -> None:
        query = sqlalchemy.text(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        while not self.ended.wait(0.3):
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError), self._engine.connect() as c:
                self.counts.append(int(c.execute(query).scalar_one()))


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of an empty store on a server of its own."""
    import pgserver

    server = pgserver.get_server(folder)
    admin = sqlalchemy.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(admin, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE many")
    engine.dispose()
    try:
        yield admin.set(database="many").render_as_string(hide_password=False)
    finally:
        server.cleanup()


def enqueued(store: Store, trials: int) -> StoredStudy:
    """The study with all its trials waiting."""
    wanted = spec(trials)
    with store.exclusively():
        study = studies.create(store, wanted)
        if study is None:
            raise SystemExit("the study is there already")
        planned = tickets.tickets(wanted, with_reference=False)
        tickets.fill(store, study.id, wanted, planned)
    return study


def work(url: str, home: Path, name: str) -> None:
    """One worker until the study is over; in a child process."""
    from sweeper.tracking import MemoryTracker
    from sweeper.worker import Worker

    Worker(
        store=open_store(url),
        tracker=MemoryTracker(),
        settings=Settings.resolve(home=home, store=url, environment={}),
        study="many",
        name=name,
        allow_imports=True,
    ).run()


def direct(url: str, home: Path, count: int) -> list[int]:
    """Fork the workers and wait for them; their exit codes."""
    import sweeper.worker  # noqa: F401 - loaded once, before the fork
    from sweeper.training import prepare

    warm = prepare(spec(1).trial_config({"optimizer.lr": 1.0e-3}), folder=home)
    next(warm.epochs())  # whatever a first epoch loads, the children have

    children = []
    for index in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with (home / f"worker-{index}.log").open("w") as log:
                    os.dup2(log.fileno(), 2)
                work(url, home, f"worker-{index}")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def client(address: str, name: str, told: dict[str, list[Any]]) -> None:
    """What a worker does to the store, without the training."""
    time.sleep(random.uniform(0, 2))
    store = patient(lambda: open_store(address), told)
    study = studies.load(store, "many")
    me = Presence(name=name, host="simulated", pid=os.getpid(), device="none", launcher="-")
    while True:
        began = time.perf_counter()
        claimed = patient(lambda: queue.claim(store, study.id, name), told)
        if claimed is None:
            break
        told["claim_s"].append(time.perf_counter() - began)
        held.values_of(study.spec, study.study, claimed)
        workers.tell(store, me)
        for epoch in range(1, EPOCHS + 1):
            time.sleep(TRIAL_S / EPOCHS)
            held.report(store, claimed, epoch, epoch / EPOCHS)
            held.beat(store, [claimed])
        held.finish(store, study.study, claimed, outcome=Outcome.COMPLETED, values=[1.0], facts={})
        told["numbers"].append(claimed.number)
    workers.leave(store, name)
    store.close()


def patient(call: Any, told: dict[str, list[Any]]) -> Any:
    """What ``call`` returns, as workers do it: again after a while where nobody answers."""
    while True:
        try:
            return call()
        except StoreUnreachableError as error:
            told["waited"].append(str(error))
            time.sleep(random.uniform(0.5, 2))


def clients(address: str, count: int, first: int) -> None:
    """One process full of clients; prints what they met as JSON."""
    told: dict[str, list[Any]] = {"numbers": [], "waited": [], "claim_s": [], "errors": []}

    def run(name: str) -> None:
        try:
            client(address, name, told)
        except Exception as error:  # noqa: BLE001 - it is counted and shown
            told["errors"].append(f"{type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=run, args=(f"client-{first + index}",)) for index in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps(told))


def proxied(url: str, home: Path, count: int) -> dict[str, list[Any]]:
    """Start a controller and the clients; everything that the clients met."""
    words = ("controller", "--port", "0", "--grpc", "127.0.0.1:0", "--home", str(home))
    log = home / "controller.log"
    environment = {**os.environ, "SWEEPER_STORE": url, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    with log.open("w") as stream:
        controller = subprocess.Popen(
            [sys.executable, "-m", "sweeper", *words], stderr=stream, env=environment
        )
    try:
        while not (found := re.search(r"grpc://\S+", log.read_text())):
            time.sleep(0.2)
        share = [count // _PROCESSES + (index < count % _PROCESSES) for index in range(_PROCESSES)]
        running = [
            subprocess.Popen(
                [sys.executable, __file__, "clients", found[0], str(many), str(sum(share[:index]))],
                stdout=subprocess.PIPE,
            )
            for index, many in enumerate(share)
        ]
        said = [json.loads(process.communicate()[0]) for process in running]
        return {key: [item for each in said for item in each[key]] for key in said[0]}
    finally:
        controller.terminate()
        controller.wait(60)


def main() -> None:
    if sys.argv[1:2] == ["clients"]:
        clients(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("how", choices=["direct", "proxy"])
    parser.add_argument("--workers", "--clients", dest="count", type=int, default=64)
    parser.add_argument("--trials", type=int, default=256)
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # for the model
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    home = folder / "home"
    home.mkdir()
    with postgres(folder / "postgres") as url:
        store = open_store(url)
        study = enqueued(store, asked.trials)
        store.close()
        sessions = Sessions(url)
        sessions.start()
        began = time.monotonic()
        if asked.how == "direct":
            codes = direct(url, home, asked.count)
            told: dict[str, list[Any]] = {"errors": [code for code in codes if code], "waited": []}
        else:
            told = proxied(url, home, asked.count)
        seconds = time.monotonic() - began
        sessions.ended.set()
        store = open_store(url)
        now = standing(store, study)
        tally = overview.tallies(store)[0]
        store.close()
    begun = sorted(row.started for row in now.rows if row.started)
    ended = sorted(row.ended for row in now.rows if row.ended)
    span_s = (ended[-1] - begun[0]).total_seconds()
    done_by = Counter(row.worker for row in now.rows)
    lines = [
        (
            f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"load {os.getloadavg()[0]:.1f}"
        ),
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"{asked.how}, {asked.count} workers, {asked.trials} trials of {TRIAL_S:.0f} s",
        f"trials by state        {dict(tally.counts)}",
        (
            f"rows in the store      {len(now.rows)}, attempts of more than one: "
            f"{sum(row.attempt > 1 for row in now.rows)}"
        ),
        (
            f"workers that trained   {len(done_by)}, trials of one: {min(done_by.values())} to "
            f"{max(done_by.values())}"
        ),
        f"seconds                {seconds:.1f} in all, {span_s:.1f} from the first claim on",
        f"trials a second        {len(now.rows) / span_s:.1f}",
        (
            f"sessions of the server {max(sessions.counts)} at most, "
            f"{statistics.median(sessions.counts):.0f} in the median"
        ),
        f"errors                 {len(told['errors'])} {told['errors'][:3]}",
        f"waits for the store    {len(told['waited'])} {told['waited'][:1]}",
    ]
    if told.get("numbers"):
        twice = [number for number, count in Counter(told["numbers"]).items() if count > 1]
        claims = sorted(told["claim_s"])
        lines += [
            f"ended twice            {twice}",
            (
                f"a claim takes          {statistics.median(claims):.3f} s in the median, "
                f"{claims[int(len(claims) * 0.95)]:.3f} s at 95 %"
            ),
        ]
    sys.stdout.write("\n".join(lines) + f"\nkept in {folder}\n")


if __name__ == "__main__":
    main()

"""Two network namespaces as two hosts: a study on two Ray nodes, one of which is cut off.

``scripts/cut-off`` runs it by hand and prints the account; it takes a minute or two. It needs root
on Linux, iproute2 and the wheels ray and pgserver. PostgreSQL and MLflow listen on a bridge that
both hosts are plugged into; pulling a plug leaves packets without an answer, as in real life.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import psutil
from cli.conftest import Sweeper
from servers.postgres import Postgres

from sweeper.service.agreement import differences
from sweeper.settings import Settings
from sweeper.store import Standing, open_store, standing, studies

EPOCHS: Final = 50
_SUBNET: Final = "10.213.77"
_START_S: Final = 120.0
_OVER_S: Final = 400.0
_LOST_AFTER_S: Final = 8


def missing() -> str | None:
    """What this machine lacks, or None where it can be two hosts."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts need network namespaces, which take root on Linux"
    if shutil.which("ip") is None:
        return "two hosts need the program ip (Debian: iproute2)"
    tried = subprocess.run(["ip", "netns", "add", "sweeper-try"], capture_output=True, check=False)
    if tried.returncode:
        return f"network namespaces cannot be made here: {tried.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "del", "sweeper-try"], capture_output=True, check=False)
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


class Network:
    """A bridge with an address of this machine, and hosts that are plugged into it."""

    own_address = f"{_SUBNET}.1"

    def __init__(self) -> None:
        self._tag = f"sw{os.getpid() % 100_000}"
        self._hosts: list[str] = []

    def __enter__(self) -> Network:
        _ip("link", "add", self._tag, "type", "bridge")
        _ip("addr", "add", f"{self.own_address}/24", "dev", self._tag)
        _ip("link", "set", self._tag, "up")
        return self

    def add(self) -> str:
        """A new host; its address."""
        name = f"{self._tag}{'abcd'[len(self._hosts)]}"
        address = f"{_SUBNET}.{len(self._hosts) + 2}"
        _ip("netns", "add", name)
        self._hosts.append(name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", self._tag, "up")
        for words in (
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", name, *words)
        return address

    def on(self, address: str) -> list[str]:
        """The words that run a command on the host at ``address``."""
        return ["ip", "netns", "exec", self._named(address)]

    def plug(self, address: str, *, in_: bool) -> None:
        """Pull the host's plug, or put it in again."""
        _ip("link", "set", self._named(address), "up" if in_ else "down")

    def _named(self, address: str) -> str:
        return self._hosts[int(address.rpartition(".")[2]) - 2]

    def __exit__(self, *_error: object) -> None:
        for name in self._hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "del", name)
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._tag)


def wait_for(found: Callable[[], Any], what: str, limit_s: float) -> Any:
    """What ``found`` gives as soon as it gives something."""
    until = time.monotonic() + limit_s
    while not (result := found()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(0.2)
    return result


def _end(process: subprocess.Popen[Any]) -> None:
    """KILL to a process and everything that it started."""
    family = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += psutil.Process(process.pid).children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            member.kill()
    process.wait()


@contextlib.contextmanager
def mlflow(folder: Path, address: str, log: Path) -> Iterator[str]:
    """An MLflow server that listens at ``address``; its own address."""
    with socket.create_server((address, 0)) as listener, log.open("ab") as stream:
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "sweeper.tracking.serve"),
                *("--socket", str(listener.fileno()), "--parent", str(os.getpid())),
            ],
            env={**os.environ, **Settings.resolve(home=folder, environment={}).environment()},
            pass_fds=[listener.fileno()],
            stdout=stream,
            stderr=stream,
        )

    def healthy() -> bool:
        with contextlib.suppress(OSError), urlopen(f"http://{address}:{port}/health", timeout=5):
            return True
        return False

    try:
        wait_for(healthy, f"MLflow answers (see {log})", _START_S)
        yield f"http://{address}:{port}"
    finally:
        _end(process)


class RayNodes:
    """Ray on the hosts of a network, for those only who know the token."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._network = network
        self._temporary = Path(tempfile.mkdtemp(prefix="ray"))  # sockets: a path must be short
        self._log = folder / "ray.log"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "4",
        }

    @property
    def head(self) -> str:
        return f"{next(iter(self.nodes))}:6379"

    def start(self, address: str, cpus: int, environment: Mapping[str, str]) -> None:
        """Start a node on the host at ``address``: the first is the head."""
        where = ["--head", "--port", "6379", "--include-dashboard=false"]
        where += ["--temp-dir", str(self._temporary)]
        if self.nodes:
            where = ["--address", self.head]
        with self._log.open("ab") as log:
            self.nodes[address] = subprocess.Popen(
                [
                    *self._network.on(address),
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                    *("--node-ip-address", address, "--num-cpus", str(cpus), *where),
                    *("--object-store-memory", "100000000", "--disable-usage-stats"),
                ],
                env={**environment, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        listens = [*self._network.on(address), "ss", "-Hltn", "sport", "=", ":6379"]
        if len(self.nodes) == 1:
            wait_for(
                lambda: subprocess.run(listens, capture_output=True, check=True).stdout,
                f"the head of Ray listens (see {self._log})",
                _START_S,
            )

    def wait(self) -> None:
        """Until every node that was started is one of the cluster's."""
        wait_for(
            lambda: self._log.read_text().count("Ray runtime started") == len(self.nodes),
            f"all nodes of Ray are up (see {self._log})",
            _START_S,
        )

    def workers(self, address: str) -> set[str]:
        """The names of the sweeper's workers on a host."""
        found = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.nodes[address].pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = process.cmdline()
                    if "worker" in words and "sweeper" in words:
                        found.add(process.environ()["SWEEPER_WORKER"])
        return found

    def close(self) -> None:
        for node in reversed(self.nodes.values()):
            _end(node)
        shutil.rmtree(self._temporary, ignore_errors=True)


@dataclass(kw_only=True)
class Account:
    """What came of it. ``wrong`` is empty where nothing was lost and nothing done twice."""

    seconds: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    cut_off: set[int] = field(default_factory=set)
    resumed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def table(self) -> str:
        """For people."""
        return json.dumps(
            {
                "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
                "trials of the store": self.attempts,
                "counts": self.counts,
                "trials on the host that was cut off": sorted(self.cut_off),
                "went on from a checkpoint": self.resumed,
                "wrong": self.wrong,
            },
            indent=2,
        )


class CutOff:
    """One study with a worker on each of two hosts; the second loses its network for a while."""

    def __init__(self, folder: Path, trials: int) -> None:
        self._sweeper = Sweeper(folder)
        self._trials = trials
        self._began = time.monotonic()
        self.account = Account()

    def _study(self) -> Path:
        return self._sweeper.write(
            name="two-hosts",
            model={"name": "mlp", "width": 8, "layers": 1, "dropout": 0.1},
            train={"epochs": EPOCHS, "batch_size": 4},
            search={"trials": self._trials, "sampler": "random", "seed": 0},
            faults={"heartbeat_s": 1, "lost_after_s": _LOST_AFTER_S, "checkpoint_s": 0},
        )

    def _at(self, moment: str) -> None:
        self.account.seconds[moment] = time.monotonic() - self._began
        sys.stderr.write(f"{self.account.seconds[moment]:6.1f} s  {moment}\n")

    def run(self) -> Account:
        """Bring everything up, cut a host off in the middle, and hold the end to account."""
        folder = self._sweeper.folder
        with contextlib.ExitStack() as stack:
            network = stack.enter_context(Network())
            here, first, second = network.own_address, network.add(), network.add()
            server = Postgres(folder / "postgres.log", address=here)
            url = stack.enter_context(contextlib.closing(server)).create("sweeper")
            uri = stack.enter_context(mlflow(folder / "mlflow", here, folder / "mlflow.log"))
            nodes = RayNodes(network, folder)
            stack.callback(nodes.close)
            for address, cpus in ((first, 2), (second, 1)):
                nodes.start(address, cpus, self._sweeper.environment)
            nodes.wait()
            self._at("Ray runs on two hosts")
            environment = {
                **self._sweeper.environment,
                **nodes.environment,
                "RAY_ADDRESS": nodes.head,
                "SWEEPER_STORE": url,
                "MLFLOW_TRACKING_URI": uri,
                "SWEEPER_HOME": str(folder / ".sweeper"),
            }
            settings = Settings.resolve(environment=environment)
            detached = self._launch(network.on(first), environment, "--detach")
            self._ended_well(detached)
            self._at("launched with --detach")
            launch = self._launch(network.on(first), environment)
            stack.callback(_end, launch)
            wait_for(lambda: "resumed" in self._log.read_text(), "launched again", _START_S)
            self._at("launched again, beside the same workers")
            self._cut_off(network, nodes, second, settings)
            self._ended_well(launch)
            self._at("the launch has ended")
            self._check(settings)
        self._at("over")
        return self.account

    @property
    def _log(self) -> Path:
        return self._sweeper.folder / "launch.log"

    def _launch(
        self, on: list[str], environment: Mapping[str, str], *words: str
    ) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [
                    *(*on, sys.executable, "-m", "sweeper", "launch", self._study()),
                    *("--launcher", "ray", "--workers", "2", *words),
                ],
                env=dict(environment),
                stdout=log,
                stderr=log,
            )

    def _ended_well(self, launch: subprocess.Popen[bytes]) -> None:
        if code := launch.wait(_OVER_S):
            raise RuntimeError(f"the launch ended with {code}:\n{self._log.read_text()[-2000:]}")

    def _standing(self, settings: Settings) -> Standing:
        store = open_store(settings.store_url)
        try:
            return standing(store, studies.load(store, "two-hosts"))
        finally:
            store.close()

    def _cut_off(self, network: Network, nodes: RayNodes, address: str, settings: Settings) -> None:
        """Pull the plug in the middle of a trial; put it in again when the trial is elsewhere."""

        def in_the_middle() -> set[int]:
            names = nodes.workers(address)
            return {
                row.number
                for row in self._standing(settings).rows
                if row.state == "running" and row.worker in names and row.history
            }

        wait_for(in_the_middle, "a trial runs on the second host", _START_S)
        network.plug(address, in_=False)
        self.account.cut_off = in_the_middle()
        self._at("the second host was cut off")

        def elsewhere() -> bool:
            rows = self._standing(settings).rows
            cut = self.account.cut_off
            again = {
                row.origin
                for row in rows
                if row.number not in cut and row.state in {"running", "complete"}
            }
            return {row.origin for row in rows if row.number in cut} <= again

        wait_for(elsewhere, "what ran on the second host goes on elsewhere", _OVER_S)
        self._at("its trials go on elsewhere")
        network.plug(address, in_=True)

    def _check(self, settings: Settings) -> None:
        now, account = self._standing(settings), self.account
        account.attempts, account.counts = len(now.rows), dict(now.counts)
        if now.counts["complete"] != self._trials or now.budget != self._trials:
            account.wrong.append(f"{self._trials} trials must be complete: {now.counts}")
        if not account.cut_off:
            account.wrong.append("no trial was cut off")
        origins = Counter(row.origin for row in now.rows if row.state == "complete")
        account.wrong += [f"trial {n} ended {c} times" for n, c in origins.items() if c > 1]
        for row in now.rows:
            if row.state == "complete" and sorted(row.history) != [*range(1, EPOCHS + 1)]:
                account.wrong.append(f"trial {row.number} has epochs {sorted(row.history)}")
            if row.number in account.cut_off and row.outcome != "lost":
                account.wrong.append(f"trial {row.number} was cut off but ended {row.outcome}")
        account.wrong += differences(now, settings)
        logs = settings.logs("two-hosts").glob("*.log")
        account.resumed = [
            line.partition("INFO ")[2]
            for file in logs
            for line in file.read_text(errors="replace").splitlines()
            if "goes on after epoch" in line
        ]


def main() -> None:
    """Print the account; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="Where to work. [default: a temporary folder]")
    arguments = parser.parse_args()
    if lack := missing():
        sys.exit(lack)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="two hosts "))
    folder.mkdir(exist_ok=True)
    account = CutOff(folder, arguments.trials).run()
    sys.stdout.write(account.table() + f"\nlogs: {folder}\n")
    sys.exit(bool(account.wrong))


if __name__ == "__main__":
    main()

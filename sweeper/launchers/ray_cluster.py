"""Workers on a Ray cluster: one detached, named keeper each (design decision 8).

A keeper is a Ray actor that runs the command line as a child and starts it again when it dies
(`sweeper.launchers.keeper`); Ray starts the keeper again, elsewhere where its machine is gone. It
needs Ray core only. What a keeper knows is in the cluster's key-value store under
``<group>/<keeper>``, so that listing never waits for a machine that does not answer.

Keepers outlive this process. A later launch of the same group finds them by name; where the head
was lost, and everything with it after a minute, it starts new ones.

`sweeper.launchers.ray` opens it; this module needs the package and is imported after Ray's
environment is settled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import ray as untyped_ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

from sweeper.errors import OutOfReachError
from sweeper.launchers.base import THREAD_VARIABLES, Group, Job, Process
from sweeper.launchers.keeper import Keeper, Record, Run

_log = logging.getLogger(__name__)
_ray: Any = untyped_ray  # half of its functions carry no types

_NAMESPACE: Final = "sweeper"
_ANSWER_S: Final = 10.0
_FRESH_S: Final = 0.3


class KeeperActor:
    """A keeper in a process of Ray's. It ends itself when there is nothing left to keep."""

    def __init__(self, group: str, name: str, job: Job) -> None:
        context = _ray.get_runtime_context()
        self._key = f"{group}/{name}"
        self._me = context.current_actor
        has_gpus = bool(context.get_accelerator_ids().get("GPU"))
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "") if has_gpus else ""
        complete = {**os.environ, **job.environment, "CUDA_VISIBLE_DEVICES": device}
        complete.pop("RAY_AUTH_TOKEN", None)  # a model's code has no business with it
        if not device:
            complete.update({key: job.environment.get(key, "1") for key in THREAD_VARIABLES})
        known = _read(self._key)
        record = Record(
            host=_ray.util.get_node_ip_address(),
            node=context.get_node_id(),
            device=device or "cpu",
            logs=str(job.logs),
            runs=known.runs if known else (),
        )
        self._keeper = Keeper(name, job.command(sys.executable), complete, record, self._publish)
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        self._keeper.run()
        while True:
            with contextlib.suppress(RayError):  # the head is away: it is still to be told
                _ray.kill(self._me, no_restart=True)
            time.sleep(_ANSWER_S)

    def _publish(self, record: Record) -> None:
        """The child is tied to this thread: nothing that the head does may end it."""
        try:
            internal_kv._internal_kv_put(
                self._key, json.dumps(record.public()), namespace=_NAMESPACE
            )
        except RayError as error:
            _log.warning("the head of the Ray cluster does not answer: %s", error)

    def log(self, name: str, lines: int) -> str:
        """The last lines of a run's output."""
        return self._keeper.log(name, lines)

    def stop(self, now: bool) -> None:
        """Signal the child, and wait for its end where it is killed."""
        self._keeper.stop(now=now)
        if now:
            self._thread.join(_ANSWER_S)


def _read(key: str) -> Record | None:
    found = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return Record.of(json.loads(found)) if found else None


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Translate what Ray raises when the cluster does not answer."""
    try:
        yield
    except RayError as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OutOfReachError(f"the Ray cluster must answer, but: {reason[0]}") from error


def connect(address: str) -> None:
    """Join the cluster at ``address``; ``local`` starts one that ends with this process.

    Raises OutOfReachError where it does not answer, or does not let us in.
    """
    if _ray.is_initialized():
        return
    own = {"include_dashboard": False} if address == "local" else {}
    if address not in {"local", "auto"}:
        _knock(address)
    try:
        _ray.init(
            address=address,
            namespace=_NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **own,
        )
    except (ConnectionError, RayError, RuntimeError) as error:
        raise OutOfReachError(
            f"the Ray cluster at RAY_ADDRESS={address} must let us in, but: {error}"
        ) from error


def _knock(address: str) -> None:
    """Raise OutOfReachError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise OutOfReachError(
            f"the head of a Ray cluster must listen at RAY_ADDRESS={address}, but: {error}"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What the cluster says of one keeper. ``lives``: Ray keeps it, running or waiting."""

    name: str
    record: Record | None
    lives: bool
    machine_lives: bool

    @property
    def runs(self) -> tuple[Run, ...]:
        if self.record is None:
            return ()
        return self.record.runs if self.machine_lives else self.record.after_the_keeper()

    @property
    def waits(self) -> bool:
        """Ray has found no place for it yet, or none any more."""
        return self.lives and all(run.exit_code is not None for run in self.runs)

    def processes(self) -> Iterator[Process]:
        """Every run, and the keeper itself where it waits."""
        record = self.record
        for run in self.runs:
            lived_s = time.time() - run.began if run.lived_s is None else run.lived_s
            yield Process(
                name=run.name,
                pid=run.pid,
                device=record.device if record else "",
                exit_code=run.exit_code,
                lived_s=max(0.0, lived_s),
                log=f"{record.logs}/{run.name}.log on {record.host}" if record else "",
                host=record.host if record else "",
            )
        if self.waits:
            yield Process(
                name=self.name,
                pid=None,
                device="waiting",
                exit_code=None,
                lived_s=0.0,
                log="no output yet",
            )


class RayLauncher:
    """Starts workers as keepers in a Ray cluster."""

    name = "ray"

    def __init__(self, group: Group, address: str) -> None:
        """Join the cluster at ``address``, or start one on this machine where it is ``local``.

        Raises OutOfReachError where the cluster does not answer, or does not let us in.
        """
        self._group = group.name
        self._looked: tuple[float, list[_Seen]] | None = None
        connect(address)
        with _reaching():
            self._forget_the_ended()

    def _forget_the_ended(self) -> None:
        """What ended before this launcher was made is not its business."""
        for seen in self._look():
            if not seen.lives:
                self._delete(seen.name)
        self._looked = None

    def _delete(self, keeper: str) -> None:
        internal_kv._internal_kv_del(f"{self._group}/{keeper}", namespace=_NAMESPACE)

    @property
    def elsewhere(self) -> bool:
        """Whether the cluster has any machine but this one."""
        with _reaching():
            here = _ray.util.get_node_ip_address()
            return any(node["NodeManagerAddress"] != here for node in _living_nodes())

    def fitting(self, gpus: float) -> int:
        """As many as the cluster's GPUs allow, or one a core where it has none."""
        with _reaching():
            total = _ray.cluster_resources()
        if gpus and total.get("GPU"):
            return max(1, int(total["GPU"] / gpus))
        return max(1, int(total.get("CPU", 1)))

    def start(self, job: Job, count: int) -> list[Process]:
        """Start ``count`` more keepers; those for which there is no room yet wait for it."""
        with _reaching():
            resources = _resources(job.gpus)
            before = {seen.name for seen in self._look()}
            free = (name for name in self._names() if name not in before)
            started = [name for name, _ in zip(free, range(count), strict=False)]
            for name in started:
                self._start_one(name, job, resources)
            self._looked = None
        return [
            process for seen in self._look() if seen.name in started for process in seen.processes()
        ]

    def _names(self) -> Iterator[str]:
        index = 0
        while True:
            yield f"{self._group}-{index}"
            index += 1

    def _start_one(self, name: str, job: Job, resources: Mapping[str, float]) -> None:
        _ray.remote(KeeperActor).options(
            name=name,
            namespace=_NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            scheduling_strategy="SPREAD",
            **resources,
        ).remote(self._group, name, job)

    def _look(self) -> list[_Seen]:
        """Every keeper of the group, in the order of their numbers."""
        now = time.monotonic()
        if self._looked and now - self._looked[0] < _FRESH_S:
            return self._looked[1]
        prefix = f"{self._group}/"
        with _reaching():
            records = {
                key.decode().removeprefix(prefix): _read(key.decode())
                for key in internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)
            }
            living = {
                name
                for name in _ray.util.list_named_actors()
                if name.rpartition("-")[0] == self._group and name.rpartition("-")[2].isdigit()
            }
            nodes = {node["NodeID"] for node in _living_nodes()}
        found = [
            _Seen(
                name=name,
                record=record,
                lives=name in living,
                machine_lives=record is not None and name in living and record.node in nodes,
            )
            for name in sorted(
                records.keys() | living, key=lambda name: int(name.rpartition("-")[2])
            )
            for record in [records.get(name)]
        ]
        self._looked = (now, found)
        return found

    def processes(self) -> list[Process]:
        """Every run of every keeper, those included that ended since this launcher was made."""
        return [process for seen in self._look() for process in seen.processes()]

    def log(self, name: str, lines: int = 20) -> str:
        """The last lines of a run's output: its last words, or what its keeper answers."""
        for seen in self._look():
            for run in seen.runs:
                if run.name != name:
                    continue
                if run.exit_code is not None:
                    return "\n".join(run.said.splitlines()[-lines:])
                with contextlib.suppress(ValueError, RayError):
                    keeper = _ray.get_actor(seen.name, namespace=_NAMESPACE)
                    return str(_ray.get(keeper.log.remote(name, lines), timeout=_ANSWER_S))
        return ""

    def stop(self, *, now: bool = False) -> None:
        """TERM to every worker; or KILL, and wait for those whose machines answer."""
        self._looked = None
        asked = []
        with _reaching():
            for seen in self._look():
                if not seen.lives:
                    continue
                with contextlib.suppress(ValueError):  # it ended a moment ago
                    keeper = _ray.get_actor(seen.name, namespace=_NAMESPACE)
                    if seen.waits:
                        _ray.kill(keeper, no_restart=True)
                    else:
                        asked.append((keeper, keeper.stop.remote(now)))
            if now and asked:
                _ray.wait(
                    [answer for _, answer in asked], num_returns=len(asked), timeout=_ANSWER_S
                )
                for keeper, _ in asked:
                    _ray.kill(keeper, no_restart=True)
        self._looked = None


def _living_nodes() -> list[dict[str, Any]]:
    return [node for node in _ray.nodes() if node["Alive"]]


def _resources(gpus: float) -> dict[str, float]:
    """What a keeper takes: its GPUs, or one core where it trains without.

    In a cluster without a single GPU, workers train on the cores, as on a machine without.
    """
    if gpus and not _ray.cluster_resources().get("GPU"):
        _log.warning("no machine of the Ray cluster has a GPU: its workers train on the CPU")
        gpus = 0
    return {"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_gpus": 0, "num_cpus": 1}

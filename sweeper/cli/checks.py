"""What ``sweeper doctor`` looks at."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy.engine import make_url

from sweeper.address import refuse_tracking_uri
from sweeper.errors import SweeperError
from sweeper.private import there
from sweeper.provenance import cpu_name, versions
from sweeper.settings import Settings, masked

_FREE_GIB: Final = 2.0
_LEAST_PYTHON: Final = (3, 11)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at. ``bad`` findings keep sweeps from running."""

    subject: str
    verdict: Literal["good", "note", "bad"]
    found: str
    advice: str = ""

    def public(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; an error in one look is its finding, not the end."""
    looks: dict[str, Callable[[Settings], Iterator[Finding]]] = {
        "versions": _versions,
        "home": _home,
        "store": _store,
        "mlflow": _mlflow,
        "checkpoints": _checkpoints,
        "device": _device,
        "data": _data,
        "spool": _spool,
    }
    findings: list[Finding] = []
    for subject, look in looks.items():
        try:
            findings.extend(look(settings))
        except SweeperError as error:
            findings.append(Finding(subject=subject, verdict="bad", found=str(error)))
    return findings


def _versions(_: Settings) -> Iterator[Finding]:
    text = ", ".join(f"{name} {version}" for name, version in versions().items())
    good = sys.version_info >= _LEAST_PYTHON
    yield Finding(
        subject="versions",
        verdict="good" if good else "bad",
        found=text,
        advice="" if good else "sweeper needs Python 3.11 or newer",
    )


def _home(settings: Settings) -> Iterator[Finding]:
    folder = there(settings.home)
    free = shutil.disk_usage(folder).free / 2**30
    if not os.access(folder, os.W_OK):
        yield Finding(
            subject="home",
            verdict="bad",
            found=f"{folder} must be writable, but is not",
            advice="set SWEEPER_HOME to a folder of yours",
        )
        return
    yield Finding(
        subject="home",
        verdict="good" if free > _FREE_GIB else "bad",
        found=f"{settings.home}, {free:.1f} GiB free",
        advice="" if free > _FREE_GIB else "free some space, or set SWEEPER_HOME elsewhere",
    )


def _store(settings: Settings) -> Iterator[Finding]:
    from sweeper.store import open_store, studies

    address = make_url(settings.store_url)
    if address.get_backend_name() == "sqlite" and not Path(str(address.database)).exists():
        yield Finding(
            subject="store", verdict="note", found="none yet; the first launch creates it"
        )
        return
    store = open_store(settings.store_url)
    names = studies.names(store)
    store.close()
    yield Finding(
        subject="store",
        verdict="good",
        found=f"{masked(settings.store_url)} answers, {len(names)} studies",
    )


def _mlflow(settings: Settings) -> Iterator[Finding]:
    from sweeper.tracking import mlflow, running_address

    if settings.tracking_uri is None:
        running = running_address(settings)
        if not running and (settings.home / "mlflow.db").exists():
            from sweeper.tracking.database import is_current

            if not is_current(settings.embedded_tracking_uri):
                yield Finding(
                    subject="mlflow",
                    verdict="note",
                    found=f"an older MLflow wrote {settings.home / 'mlflow.db'}",
                    advice="the next launch or report brings it up to date and keeps a copy",
                )
        yield Finding(
            subject="mlflow",
            verdict="good" if running else "note",
            found=running or "a local server is started with every launch",
            advice="" if running else "see the runs of past studies with: sweeper ui",
        )
        return
    refuse_tracking_uri(settings.tracking_uri)
    client = mlflow.connect(settings.tracking_uri)
    with mlflow.translated(f"ask {masked(settings.tracking_uri)}"):
        client.search_experiments(max_results=1)
    yield Finding(
        subject="mlflow", verdict="good", found=f"{masked(settings.tracking_uri)} answers"
    )


def _checkpoints(settings: Settings) -> Iterator[Finding]:
    from sweeper.checkpoints import refuse_unusable

    refuse_unusable(settings.checkpoints)
    where = settings.checkpoints.rpartition("@")[2]  # without what may be a password
    yield Finding(subject="checkpoints", verdict="good", found=f"go to {where}")


def _device(_: Settings) -> Iterator[Finding]:
    from sweeper.launchers.local import cores, gpus
    from sweeper.training.device import visible

    seen, usable = gpus(), visible()
    if not usable:
        yield Finding(
            subject="device",
            verdict="bad" if seen else "note",
            found=f"no GPU that torch can use; {cpu_name()}, {cores()} cores",
            advice=f"nvidia-smi lists {len(seen)} GPUs: install a torch built for their driver"
            if seen
            else "trials run on the CPU, one worker a core",
        )
    for index, (name, memory_gib) in enumerate(usable):
        yield Finding(
            subject="device", verdict="good", found=f"GPU {index}: {name}, {memory_gib:.0f} GiB"
        )


def _data(settings: Settings) -> Iterator[Finding]:
    folders = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "kmnist": "KMNIST/raw"}
    folders["cifar10"] = "cifar-10-batches-py"
    from sweeper.data.shared import usage

    there = [name for name, part in folders.items() if (settings.data / part).is_dir()]
    count, nbytes = usage(settings.prepared)
    prepared = f"; {settings.prepared}: {count} files, {nbytes / 2**30:.1f} GiB" if count else ""
    yield Finding(
        subject="data",
        verdict="note",
        found=f"{settings.data} has {', '.join(there) or 'no data set yet'}{prepared}",
        advice="others are downloaded when a study first needs them; digits needs no file",
    )


def _spool(settings: Settings) -> Iterator[Finding]:
    from sweeper.tracking.journal import pending, refused

    left, _ = pending(settings.spool)
    yield Finding(
        subject="spool",
        verdict="note" if left else "good",
        found=f"{left} journals wait for MLflow" if left else "nothing waits for MLflow",
        advice="send them with: sweeper sync" if left else "",
    )
    for each in refused(settings.spool):
        yield Finding(
            subject="spool",
            verdict="note",
            found=f"{each.path} has {each.count} records that MLflow refused: {each.reason}",
            advice="send them once more with: sweeper sync; delete what it refuses for good",
        )

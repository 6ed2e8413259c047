"""Where a number came from: commit, command, versions, hardware."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from sweeper import __version__
from sweeper.private import redacted
from sweeper.settings import COMMIT_TAG

_PACKAGES = ("torch", "torchvision", "optuna", "mlflow", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of sweeper, Python and the packages that decide numbers."""
    found = {"sweeper": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit(folder: Path | None = None) -> str | None:
    """The git commit of ``folder`` (the current one), with ``-dirty`` where files differ."""
    where = ["git", "-C", str(folder or Path.cwd())]
    try:
        head = subprocess.run(
            [*where, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        changed = subprocess.run(
            [*where, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


@functools.cache
def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def environment_tags() -> dict[str, str]:
    """Tags of an MLflow run that say where and with what it was trained."""
    tags = {f"sweeper.version.{name}": version for name, version in versions().items()}
    tags["sweeper.cpu"] = cpu_name()
    tags["sweeper.host"] = platform.node()
    tags["sweeper.cpus"] = str(os.cpu_count() or 1)
    if found := commit():
        tags[COMMIT_TAG] = found
    return tags


def command() -> str:
    """The command line of this process, fit to be shown: an address's password is left out."""
    return redacted(" ".join(["sweeper", *sys.argv[1:]]))

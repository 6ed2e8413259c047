"""Launchers start workers: here on this machine, or on Ray and SLURM clusters."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final, Literal

from sweeper.launchers.base import PYTHON, Group, Job, Launcher, Process
from sweeper.launchers.local import LocalLauncher, automatic_workers
from sweeper.launchers.replicas import Replicas

__all__ = [
    "LAUNCHERS",
    "PYTHON",
    "Group",
    "Job",
    "Launcher",
    "LauncherName",
    "LocalLauncher",
    "Process",
    "Replicas",
    "automatic_workers",
    "open_launcher",
]

LauncherName = Literal["local", "ray", "slurm"]

LAUNCHERS: Final[Mapping[LauncherName, tuple[str, str]]] = {
    "local": ("sweeper.launchers.local", "LocalLauncher"),
    "ray": ("sweeper.launchers.ray", "open_ray"),
    "slurm": ("sweeper.launchers.slurm", "SlurmLauncher"),
}
"""Module and what makes one of each; it is called with a :class:`Group`. Loaded when asked for."""


def open_launcher(name: LauncherName, group: Group) -> Launcher:
    """The launcher called ``name``, for the workers of ``group``.

    Raises:
        UsageError: what it needs is not here (a cluster, a program).
        MissingExtraError: the package it needs is not installed.
    """
    module, attribute = LAUNCHERS[name]
    opened: Launcher = getattr(import_module(module), attribute)(group)
    return opened

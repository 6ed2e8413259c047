"""Launchers start workers: here on this machine, later on Ray and SLURM clusters."""

from sweeper.launchers.base import Job, Launcher, Process
from sweeper.launchers.local import LocalLauncher, automatic_workers

__all__ = ["Job", "Launcher", "LocalLauncher", "Process", "automatic_workers"]

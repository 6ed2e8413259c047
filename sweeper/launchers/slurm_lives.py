"""The workers that one job of an array has had, as its script wrote them down.

::

    start NAME HOST PID DEVICE SECONDS
    end NAME CODE SECONDS again|requeue|told|last

The last word is what follows: another worker at once, or in the job that is queued again; nothing,
because the worker was told to end, and what told it may queue the job again; or nothing at all.
Names count on when the job is queued again. A worker without a line of its end either lives, or
nobody was left to write one: its node failed, or SLURM killed the whole job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """One worker. ``exit_code`` is None without a line of its end, ``-N`` after signal N.

    ``began_s`` and ``ended_s`` are seconds since 1970 by the node's clock.
    """

    name: str
    host: str
    pid: int
    device: str
    began_s: float
    ended_s: float | None = None
    exit_code: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lives:
    """Every worker of one job, in order. ``over``: no other is to come, unless SLURM wants one."""

    begun: Sequence[Life] = ()
    over: bool = False

    @property
    def living(self) -> bool:
        """Whether the last one has no line of its end."""
        return bool(self.begun) and self.begun[-1].exit_code is None


def lives_of(file: Path) -> Lives:
    """What ``file`` says; nothing where it is not there. A line that is half written is none."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Lives()
    begun: dict[str, Life] = {}
    over = False
    for line in text.splitlines(keepends=True):
        match line.split() if line.endswith("\n") else ():
            case ["start", name, host, pid, device, began]:
                begun[name] = Life(
                    name=name, host=host, pid=int(pid), device=device, began_s=float(began)
                )
                over = False
            case ["end", name, code, ended, following] if name in begun:
                number = int(code)
                begun[name] = replace(
                    begun[name],
                    ended_s=float(ended),
                    exit_code=128 - number if number > 128 else number,
                )
                over = following == "last"
    return Lives(begun=tuple(begun.values()), over=over)

"""What a trial says to its tracker: five calls, none of which waits for a server.

A run is named by its *key* (``settings.run_key``), never by MLflow's run id: the id is known only
once the server has answered, and a trial must not wait for that. The same key started again by
the same study continues the same run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from sweeper.settings import ANYBODY, Owner

STATUSES: Final = ("FINISHED", "FAILED", "KILLED")
"""How a run can end, in MLflow's words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """A run as it begins.

    ``experiment`` is the study's name, ``params`` have dotted names, ``start_time_ms`` is when
    *this attempt* began: of two attempts at one key, the later decides status and tags.
    ``dataset`` is described as in :meth:`Tracker.note`. A run of the same key that is not
    ``owner``'s is another one.
    """

    key: str
    experiment: str
    name: str
    start_time_ms: int
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, Any] | None = None
    owner: Owner = ANYBODY


class Tracker(Protocol):
    """Where the measurements of trials go. Safe to use from several threads.

    Every call but ``start`` raises ValueError for a key that this tracker never started. No call
    raises because of the server.

    A metric has one value a step: where a resumed trial measures a step again, the first value
    stays. NaN and infinity arrive as NaN: a gap in the curve, sorted last either way, and the tag
    ``sweeper.nonfinite`` tells what the value was and at which step. (MLflow itself would store
    infinity as 1.797e308, the best of all values where more is better. Where a metric *ends* with
    NaN, MLflow's page of that run shows no curve of it; the page that compares runs does.)
    """

    def start(self, run: RunStart) -> None:
        """Begin a run, or continue the one of that key: its status is RUNNING again."""

    def log(self, key: str, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Metrics of one step, measured at ``timestamp_ms`` (milliseconds since 1970)."""

    def note(
        self,
        key: str,
        *,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        dataset: Mapping[str, Any] | None = None,
    ) -> None:
        """What became known of a run after it began. Metrics go to step 0.

        A parameter keeps its first value. ``dataset`` has ``name``, ``digest`` and ``source`` (a
        path or URL), and may have ``schema``, ``profile`` (both JSON-able) and ``context``. Without
        a ``profile``, whatever else it has becomes the profile.
        """

    def artifact(self, key: str, file: Path, folder: str = "") -> None:
        """Keep ``file`` with the run, in ``folder`` of its artifacts. The file is copied now."""

    def end(
        self,
        key: str,
        *,
        status: str,
        end_time_ms: int,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """End a run as one of :data:`STATUSES`. Metrics go to the last step that was logged."""


def plain(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics as floats with infinity turned into NaN, and what each non-finite value was."""
    values = {name: float(value) for name, value in metrics.items()}
    odd = {name: repr(value) for name, value in values.items() if not math.isfinite(value)}
    return {name: math.nan if name in odd else value for name, value in values.items()}, odd


def text(value: Any) -> str:
    """A parameter's value as people write it: strings and numbers as they are, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return json.dumps(value, default=str, sort_keys=True)
    return repr(value)


class Nonfinite:
    """Which metrics of a run were NaN or infinite, and at which step they were so first."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def tag(self, odd: Mapping[str, str], step: int) -> str | None:
        """The tag's text, or None if ``odd`` tells nothing new."""
        fresh = {name: value for name, value in odd.items() if name not in self._first}
        if not fresh:
            return None
        self._first.update(
            {name: f"{name}={value} at step {step}" for name, value in fresh.items()}
        )
        return "; ".join(self._first.values())

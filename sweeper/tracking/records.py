"""One line of a journal: everything needed to repeat one call of a tracker later.

Times are fixed when a thing is measured, so that sending a record twice changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self


class Kind(StrEnum):
    """Which call of :class:`~sweeper.tracking.protocol.Tracker` a record repeats."""

    START = "start"
    LOG = "log"
    NOTE = "note"
    FILE = "file"
    END = "end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """``number`` counts a journal's records from 1; every record names its run in full.

    ``started_ms`` is when the attempt began that the record belongs to, ``time_ms`` when its thing
    was measured.

    ``data`` holds what the kind needs: ``metrics``, ``step``, ``params``, ``tags``, ``dataset``,
    ``name`` (of a run), ``status``, ``file`` (relative to the spool) and ``folder``.
    """

    number: int
    kind: Kind
    key: str
    experiment: str
    started_ms: int
    time_ms: int
    data: Mapping[str, Any]

    def line(self) -> bytes:
        """The record as one line of JSON, newline included. NaN is written as ``NaN``."""
        return (
            json.dumps(
                {
                    "n": self.number,
                    "kind": self.kind,
                    "key": self.key,
                    "experiment": self.experiment,
                    "started_ms": self.started_ms,
                    "time_ms": self.time_ms,
                    "data": self.data,
                },
                separators=(",", ":"),
                default=str,
            ).encode()
            + b"\n"
        )

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """The record of a line. Raises ValueError for a line that is none."""
        try:
            raw = json.loads(line)
            return cls(
                number=int(raw["n"]),
                kind=Kind(raw["kind"]),
                key=str(raw["key"]),
                experiment=str(raw["experiment"]),
                started_ms=int(raw["started_ms"]),
                time_ms=int(raw["time_ms"]),
                data=dict(raw["data"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a journal line must be a record, but {error!r}") from error

"""One line of a journal: everything needed to repeat one call of a tracker later.

Times are fixed when a thing is measured, so that sending a record twice changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    was measured. ``study_id`` tells studies of one name apart; older versions wrote none.

    ``data`` holds what the kind needs: ``metrics``, ``step``, ``params``, ``tags``, ``dataset``,
    ``name`` (of a run), ``status``, ``file`` (relative to the spool) and ``folder``; a start also
    ``since_ms`` and ``run_ids`` of its :class:`~sweeper.settings.Owner`.
    """

    number: int
    kind: Kind
    key: str
    experiment: str
    started_ms: int
    time_ms: int
    data: Mapping[str, Any]
    study_id: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return {
            "n": self.number,
            "kind": self.kind,
            "key": self.key,
            "experiment": self.experiment,
            "study_id": self.study_id,
            "started_ms": self.started_ms,
            "time_ms": self.time_ms,
            "data": self.data,
        }

    def line(self) -> bytes:
        """The record as one line of JSON, newline included. NaN is written as ``NaN``."""
        return json.dumps(self.as_dict(), separators=(",", ":"), default=str).encode() + b"\n"

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
                study_id=str(raw.get("study_id", "")),
                started_ms=int(raw["started_ms"]),
                time_ms=int(raw["time_ms"]),
                data=dict(raw["data"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a journal line must be a record, but {error!r}") from error


def refused(line: str, unknown_ms: int) -> list[Record]:
    """The records of a line in a file of refused ones: a whole record, or a part of a batch.

    Those of older versions lack times, for which ``unknown_ms`` stands, and have what belongs to
    ``data`` beside the rest. Raises ValueError for a line that is none.
    """
    raw = json.loads(line)
    try:
        raw.pop("reason", None)
        kind = Kind(raw.pop("kind")) if "kind" in raw else None
        whole = Record(
            number=0,
            kind=kind or Kind.NOTE,
            key=str(raw.pop("key")),
            experiment=str(raw.pop("experiment")),
            study_id=str(raw.pop("study_id", "")),
            started_ms=int(raw.pop("started_ms", 0)),
            time_ms=int(raw.pop("time_ms", unknown_ms)),
            data=raw.get("data", raw),
        )
        if kind is not None:
            only_its_data_set = kind is Kind.START and "name" not in whole.data
            return [replace(whole, kind=Kind.NOTE) if only_its_data_set else whole]
        points = raw.pop("metrics", ())
        return [whole] * bool(raw.get("params") or raw.get("tags")) + [
            replace(
                whole,
                kind=Kind.LOG,
                time_ms=int(point["time_ms"]),
                data={
                    "metrics": {str(point["name"]): float(point["value"])},
                    "step": int(point["step"]),
                },
            )
            for point in points
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a line must be what was refused, but {error!r}") from error

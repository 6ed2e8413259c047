"""What is sent to MLflow, cut and fitted to its limits. No MLflow in here.

What MLflow does not accept, or would change without a word, is made to fit visibly: a parameter
of more than 6,000 characters is cut and says so, a name of more than 250 keeps a digest of what
was cut off, characters that a name must not have become ``_``.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MAX_METRICS: Final = 1000
MAX_PARAMS: Final = 100
MAX_TAGS: Final = 100
_MAX_NAME: Final = 250
_MAX_PARAM: Final = 6000
_MAX_TAG: Final = 8000


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One value of one metric."""

    name: str
    value: float
    time_ms: int
    step: int


@dataclass(kw_only=True, slots=True)
class Batch:
    """What one ``log_batch`` call can carry."""

    metrics: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.metrics) + len(self.params) + len(self.tags)

    def as_dict(self) -> dict[str, Any]:
        """For people, in the file of refused records."""
        return {
            "metrics": [
                {"name": p.name, "value": repr(p.value), "time_ms": p.time_ms, "step": p.step}
                for p in self.metrics
            ],
            "params": self.params,
            "tags": self.tags,
        }


def batches(
    metrics: Iterable[Point], params: Mapping[str, str], tags: Mapping[str, str]
) -> Iterator[Batch]:
    """Cut what is to be sent into batches that MLflow takes (numbers, and a megabyte a request)."""
    points = list(metrics)
    parameters, labels = list(params.items()), list(tags.items())
    small = (
        len(points) <= MAX_METRICS // 2
        and sum(len(k) + len(v) for k, v in parameters + labels) <= 200_000
    )
    if small and len(parameters) <= MAX_PARAMS and len(labels) <= MAX_TAGS:
        if points or parameters or labels:
            yield Batch(metrics=points, params=dict(parameters), tags=dict(labels))
        return
    for start in range(0, len(points), MAX_METRICS):
        yield Batch(metrics=points[start : start + MAX_METRICS])
    for start in range(0, len(parameters), MAX_PARAMS):
        yield Batch(params=dict(parameters[start : start + MAX_PARAMS]))
    for start in range(0, len(labels), MAX_TAGS):
        yield Batch(tags=dict(labels[start : start + MAX_TAGS]))


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """A batch of two or more entries as two, to find the one that is refused."""
    entries: list[Point | tuple[str, str, str]] = [
        *batch.metrics,
        *(("params", key, value) for key, value in batch.params.items()),
        *(("tags", key, value) for key, value in batch.tags.items()),
    ]
    parts = (Batch(), Batch())
    for index, entry in enumerate(entries):
        part = parts[index >= len(entries) // 2]
        if isinstance(entry, Point):
            part.metrics.append(entry)
        elif entry[0] == "params":
            part.params[entry[1]] = entry[2]
        else:
            part.tags[entry[1]] = entry[2]
    return parts


def fitting_name(name: str) -> str:
    """A metric's, parameter's or tag's name that MLflow accepts."""
    clean = re.sub(r"[^/\w.\- :]", "_", name)
    if _is_path_elsewhere(clean):
        clean = clean.replace("/", "_")
    if _is_path_elsewhere(clean):
        clean = f"_{clean}"
    if len(clean) <= _MAX_NAME:
        return clean
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{clean[: _MAX_NAME - 9]}_{digest}"


def _is_path_elsewhere(name: str) -> bool:
    """Whether a name, taken for a path, is another one's or leads out; MLflow refuses those."""
    return posixpath.normpath(name) != name or name == "." or name.startswith(("/", ".."))


def fitting_param(value: str) -> str:
    """A parameter's value that MLflow stores whole."""
    return _cut(value, _MAX_PARAM)


def fitting_tag(value: str) -> str:
    """A tag's value that MLflow stores whole."""
    return _cut(value, _MAX_TAG)


def _cut(value: str, limit: int) -> str:
    if len(value) <= limit:
        return value
    notice = f" … [cut: {len(value)} characters]"
    return value[: limit - len(notice)] + notice

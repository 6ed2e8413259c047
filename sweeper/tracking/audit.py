"""A study's runs as MLflow has them, doubles included: for comparing them with the store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sweeper.settings import ANYBODY, ROLE_TAG, ROLE_TRIAL, RUN_KEY_TAG, Owner, Settings
from sweeper.tracking.batch import Batch, Point, fitting_name
from sweeper.tracking.history import _points
from sweeper.tracking.mlflow import connect, list_runs, log_batch, set_status
from sweeper.tracking.service import readable_uri


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedRun:
    """One trial's run. ``points``: metric → step → how often MLflow has a value there."""

    run_id: str
    key: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    points: Mapping[str, Mapping[int, int]] = field(default_factory=dict)


def audited(
    settings: Settings, study: str, metrics: Sequence[str] = (), *, owner: Owner = ANYBODY
) -> list[AuditedRun]:
    """The owner's runs of a study's trials, with the points of ``metrics``.

    Raises TrackerUnreachableError, and TrackerRefusedError where MLflow will not answer.
    """
    uri = readable_uri(settings)
    if uri is None:
        return []
    client = connect(uri)
    runs = list_runs(client, study, f"tags.`{ROLE_TAG}` = '{ROLE_TRIAL}'", owner)
    run_ids = [str(run.info.run_id) for run in runs]
    points: dict[str, dict[str, Counter[int]]] = {run_id: {} for run_id in run_ids}
    for metric in metrics:
        for start in range(0, len(run_ids), 100):
            for run_id, step, _ in _points(
                client, run_ids[start : start + 100], fitting_name(metric)
            ):
                points[run_id].setdefault(metric, Counter())[step] += 1
    return [
        AuditedRun(
            run_id=str(run.info.run_id),
            key=run.data.tags.get(RUN_KEY_TAG, ""),
            status=str(run.info.status),
            tags=dict(run.data.tags),
            params=dict(run.data.params),
            metrics=dict(run.data.metrics),
            points=points[str(run.info.run_id)],
        )
        for run in runs
    ]


def end_run(
    settings: Settings,
    run: AuditedRun,
    status: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    step: int,
) -> None:
    """End a run that nobody works on any more, with ``metrics``. Raises as :func:`audited`."""
    uri = readable_uri(settings)
    if uri is not None:
        client, now_ms = connect(uri), round(time.time() * 1000)
        points = [
            Point(name=name, value=value, time_ms=now_ms, step=step)
            for name, value in metrics.items()
        ]
        log_batch(client, run.run_id, Batch(metrics=points, tags=dict(tags)))
        set_status(client, run.run_id, status, end_time_ms=now_ms)

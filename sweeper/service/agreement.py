"""Whether the store and MLflow say the same of every trial of a study.

What is compared: one run a trial and one trial a run, state and outcome, parameters, last metrics,
and every epoch once. Times and memory of an epoch are not: an epoch that was repeated after a loss
keeps its first figures in MLflow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from sweeper.measurement import EPOCH_METRICS
from sweeper.report.configurations import resolved
from sweeper.settings import OUTCOME_TAG, STATE_TAG, Settings, run_key
from sweeper.store import Outcome, Standing, TrialRow, open_store, standing, studies
from sweeper.store.glance import is_over
from sweeper.study.spec import StudySpec
from sweeper.tracking.audit import AuditedRun, audited, end_run
from sweeper.tracking.protocol import text
from sweeper.worker import flattened

_STATUS: Final = {
    "complete": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "running": "RUNNING",
    "waiting": "KILLED",
}
_TIMES: Final = frozenset({"seconds", "val_seconds", "samples_per_s", "peak_memory_mib"})


def differences(now: Standing, settings: Settings) -> list[str]:
    """A line for everything on which the store and MLflow differ."""
    runs = audited(settings, now.spec.name, list(EPOCH_METRICS), owner=now.owner)
    by_key = {run.key: run for run in runs}
    found = [
        f"MLflow has {count} runs of the key {key}, and one is right"
        for key, count in Counter(run.key for run in runs).items()
        if count > 1
    ]
    rows = [row for row in now.rows if row.state != "retried"]
    keys = {run_key(now.spec.name, row.origin) for row in rows}
    found += [
        f"the run {run.run_id} ({run.key}) belongs to no trial"
        for run in runs
        if run.key not in keys
    ]
    for row in rows:
        run = by_key.get(run_key(now.spec.name, row.origin))
        if run is not None:
            wanted = _resolved(now.spec, row)
            found += [f"trial {row.number}: {line}" for line in _of_trial(row, run, wanted)]
        elif row.state != "waiting":
            found.append(f"trial {row.number} ({row.state}) has no run")
    return found


def lagging(now: Standing, settings: Settings) -> int:
    """How many trials have ended while their runs do not say so yet, or are not even there."""
    statuses = {run.key: run.status for run in audited(settings, now.spec.name, owner=now.owner)}
    return sum(
        statuses.get(run_key(now.spec.name, row.origin)) != _STATUS[row.state]
        for row in now.rows
        if row.state in {"complete", "pruned", "failed"}
    )


def settle(now: Standing, settings: Settings) -> int:
    """End the runs of trials whose workers cannot say any more how they ended; how many.

    A worker that was killed between the store and its spool had told the store alone, final
    metrics included.
    """
    rows = {run_key(now.spec.name, row.origin): row for row in now.rows if row.state != "retried"}
    several = len(now.spec.objective) > 1  # of such a study the store has no epochs
    ended = 0
    known = ["train_loss"] if several else []
    for run in audited(settings, now.spec.name, known, owner=now.owner):
        row = rows.get(run.key)
        if row is None or row.state == "running" or run.status == _STATUS[row.state]:
            continue
        outcome = row.outcome or str(Outcome.PREEMPTED)
        tags = {STATE_TAG: row.state, OUTCOME_TAG: outcome}
        final = {
            name: value
            for name, value in row.metrics.items()
            if name not in EPOCH_METRICS and name not in run.metrics
        }
        last = max((*row.history, *run.points.get("train_loss", ())), default=0)
        end_run(settings, run, _STATUS[row.state], tags, final, last)
        ended += 1
    return ended


def settle_all(settings: Settings) -> int:
    """:func:`settle` all studies of the store that are over. Raises StoreUnreachableError."""
    store = open_store(settings.store_url)
    try:
        found = (studies.load(store, name) for name in studies.names(store))
        over = [study for study in found if is_over(store, study)]
        return sum(settle(standing(store, study), settings) for study in over)
    finally:
        store.close()


def _resolved(spec: StudySpec, row: TrialRow) -> dict[str, Any]:
    """What a run has as parameters: a trial's own with what they leave to defaults."""
    return flattened(resolved(spec, row.params) or {})


def _of_trial(row: TrialRow, run: AuditedRun, wanted: Mapping[str, Any]) -> Iterator[str]:
    if run.status != _STATUS[row.state]:
        yield f"it is {row.state} in the store, but its run is {run.status}"
    if run.tags.get(STATE_TAG) != row.state:
        yield f"it is {row.state} in the store, but tagged {run.tags.get(STATE_TAG)!r}"
    if row.state not in {"waiting", "running"} and run.tags.get(OUTCOME_TAG) != row.outcome:
        yield f"it ended as {row.outcome}, but is tagged {run.tags.get(OUTCOME_TAG)!r}"
    yield from _parameters(row, run, wanted)
    if row.state in {"complete", "pruned"}:
        yield from _epochs(row, run)
        yield from _last_metrics(row, run)


def _parameters(row: TrialRow, run: AuditedRun, wanted: Mapping[str, Any]) -> Iterator[str]:
    for path, own in flattened(row.params).items():
        logged = run.params.get(path, run.params.get(f"{path}.name"))
        value = wanted.get(path, wanted.get(f"{path}.name", own))
        if logged is None:
            yield f"its run lacks the parameter {path}"
        elif not _same(text(value), logged):
            yield f"{path} is {text(value)} in the store, but {logged} in MLflow"


def _same(left: str, right: str) -> bool:
    try:
        return float(left) == float(right)
    except ValueError:
        return left == right


def _epochs(row: TrialRow, run: AuditedRun) -> Iterator[str]:
    reported = max(row.history, default=0)
    for metric, steps in run.points.items():
        doubled = sorted(step for step, count in steps.items() if count > 1)
        if doubled:
            yield f"MLflow has {metric} more than once at the epochs {doubled}"
        last = max(steps)
        missing = sorted(set(range(1, max(last, reported) + 1)) - set(steps))
        if missing:
            yield f"MLflow lacks {metric} at the epochs {missing}"
    if "train_loss" not in run.points:
        yield "MLflow has no epoch of it"


def _last_metrics(row: TrialRow, run: AuditedRun) -> Iterator[str]:
    for name, value in row.metrics.items():
        if name in _TIMES or (row.outcome == Outcome.DIVERGED and name in EPOCH_METRICS):
            continue
        logged = run.metrics.get(name)
        if logged is None:
            yield f"its run lacks the metric {name}"
        elif not math.isclose(value, logged, rel_tol=1e-9) and not math.isnan(value):
            yield f"{name} is {value} in the store, but {logged} in MLflow"

"""Everything that a report says of a study, gathered once, as frozen values."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sweeper.errors import SweeperError
from sweeper.provenance import versions
from sweeper.report.configurations import Configuration, configurations, ranked, varied
from sweeper.settings import COMMIT_TAG, Settings, run_key, study_run_key
from sweeper.store import Standing, Store, StoredStudy, TrialRow, standing
from sweeper.tracking.history import RunRecord, records

_log = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Told what is being done, for people who wait."""


def silent(_: str) -> None:
    """Nobody waits."""


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """A study as its report sees it.

    ``found`` are its configurations, ``factors`` the paths in which they differ. ``runs`` are the
    tracker's records by run key; where there are none, ``tracker_problem`` says why. ``command``
    is what started the study, empty where nobody knows. ``allow_imports``: a model of the study's
    own may be imported, because the study is trusted.
    """

    study: StoredStudy
    now: Standing
    found: tuple[Configuration, ...]
    factors: tuple[str, ...]
    runs: Mapping[str, RunRecord] = field(default_factory=dict)
    tracker_problem: str = ""
    command: str = ""
    allow_imports: bool = False

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def ranked(self) -> list[Configuration]:
        """Configurations with a completed trial, the best first."""
        return ranked(self.now.spec, self.found)

    def run(self, row: TrialRow) -> RunRecord | None:
        """The tracker's record of a trial: a retried one goes on in the run of its origin."""
        return self.runs.get(run_key(self.name, row.origin))

    def history(self, row: TrialRow, metric: str) -> Mapping[int, float]:
        """Epoch → value, from the tracker; else the store's, which has the first objective only."""
        run = self.run(row)
        if run is not None and run.history.get(metric):
            return run.history[metric]
        return row.history if metric == self.now.spec.objective[0].metric else {}

    def epochs(self, row: TrialRow) -> int | None:
        """The epochs that a trial has finished; None where nobody knows.

        The store has none of a study with several objectives, and the tracker has those of all
        attempts together.
        """
        if len(self.now.spec.objective) == 1:
            return row.epoch or 0
        run = self.run(row) if row.state != "retried" else None
        return None if run is None else max(run.history.get("train_loss", {}), default=0)

    def tags(self, name: str) -> dict[str, int]:
        """The values that a tag has among the trials' runs, the most frequent first."""
        known = (self.run(row) for row in self.now.rows if row.state != "retried")
        return dict(
            Counter(run.tags[name] for run in known if run and name in run.tags).most_common()
        )


def collect(
    store: Store,
    study: StoredStudy,
    settings: Settings,
    *,
    command: str = "",
    allow_imports: bool = False,
    say: Say = silent,
) -> StudyData:
    """Read the study from the store, and its runs from the tracker where it answers."""
    now = standing(store, study)
    spec = study.spec
    runs: Mapping[str, RunRecord] = {}
    problem = ""
    say("reading the runs from MLflow")
    try:
        runs = records(settings, study.name, owner=now.owner)
    except SweeperError as error:
        problem = f"MLflow cannot be read: {error}"
        _log.warning("%s", problem)
    if not runs and not problem:
        problem = "MLflow has no run of this study"
    started = runs.get(study_run_key(study.name))
    found = configurations(spec, now.rows)
    return StudyData(
        study=study,
        now=now,
        found=found,
        factors=tuple(varied(spec, [(config.resolved, config.params) for config in found])),
        runs=runs,
        tracker_problem=problem,
        command=command or (started.tags.get("sweeper.command", "") if started else ""),
        allow_imports=allow_imports,
    )


def device_seconds(rows: tuple[TrialRow, ...]) -> float:
    """Seconds in which a worker had a trial, added up over the workers.

    Trials that one worker had at the same time count once. Attempts that were lost count too.
    """
    busy: dict[str, list[tuple[datetime, datetime]]] = {}
    total = 0.0
    for row in rows:
        if row.started is not None and row.ended is not None and row.worker is not None:
            busy.setdefault(row.worker, []).append((row.started, row.ended))
        elif row.seconds is not None:
            total += row.seconds
    for spans in busy.values():
        until = datetime.min
        for start, end in sorted(spans):
            total += max(0.0, (end - max(start, until)).total_seconds())
            until = max(until, end)
    return total


def wall_seconds(rows: tuple[TrialRow, ...]) -> float | None:
    """Seconds from the first trial's start to the last one's end; None before any has ended."""
    starts = [row.started for row in rows if row.started is not None]
    ends = [row.ended for row in rows if row.ended is not None]
    return (max(ends) - min(starts)).total_seconds() if starts and ends else None


def hardware(data: StudyData) -> list[str]:
    """The devices that trained, each with its number of runs where there are several."""
    devices = data.tags("sweeper.note.device")
    cpus = data.tags("sweeper.cpu")
    return _counted(devices) + [f"processor: {text}" for text in _counted(cpus)]


def provenance(data: StudyData) -> dict[str, list[str]]:
    """Title → values of what a number depends on: command, commit, versions, hardware."""
    result = {
        "command": [data.command] if data.command else [],
        "commit": _counted(data.tags(COMMIT_TAG)),
        "hardware": hardware(data),
        "host": _counted(data.tags("sweeper.host")),
        "best run": [run.run_id] if data.now.best and (run := data.run(data.now.best)) else [],
    }
    for name in versions():
        result[name] = _counted(data.tags(f"sweeper.version.{name}"))
    return result


def _counted(values: Mapping[str, int]) -> list[str]:
    if len(values) < 2:
        return list(values)
    return [f"{value} ({number} runs)" for value, number in values.items()]

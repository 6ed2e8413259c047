"""One worker in the test's own process, around a study of its own, and what its trials gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeper.measurement import SUMMARY_METRICS
from sweeper.settings import Settings
from sweeper.store import (
    Standing,
    Store,
    StoredStudy,
    open_store,
    standing,
    studies,
    tickets,
)
from sweeper.study.spec import StudySpec
from sweeper.tracking import MemoryTracker
from sweeper.worker import Signals, Worker

TIMES = {"seconds", "val_seconds", "samples_per_s", "peak_memory_mib"}
TIMES |= {name for name, (metric, _) in SUMMARY_METRICS.items() if metric in TIMES}
BASE = {
    "name": "small",
    "data": {"name": "digits", "limit": 200},
    "model": {"name": "mlp", "width": 16, "layers": 1},
    "train": {"epochs": 3, "batch_size": 50},
    "search": {"trials": 2, "sampler": "random"},
    "parameters": {"optimizer.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}},
}


class Bench:
    """A store, a tracker and a worker around one study."""

    def __init__(self, home: Path, **sections: object) -> None:
        spec = StudySpec.model_validate({**BASE, **sections})
        self.settings = Settings.resolve(home=home, environment={"SWEEPER_DATA": str(home)})
        self.store: Store = open_store(self.settings.store_url)
        with self.store.exclusively():
            study = studies.create(self.store, spec)
            if study is None:
                raise ValueError("the study is there already")
            tickets.fill(self.store, study.id, spec, tickets.tickets(spec, with_reference=True))
        self.study: StoredStudy = study
        self.tracker = MemoryTracker()
        self.signals = Signals()
        self.worker = Worker(
            store=self.store,
            tracker=self.tracker,
            settings=self.settings,
            study=spec.name,
            name="me",
            allow_imports=True,
            signals=self.signals,
        )

    @property
    def now(self) -> Standing:
        return standing(self.store, self.study)


MakeBench = Callable[..., Bench]


def numbers(found: Bench) -> dict[int, Any]:
    """What every trial of the study gave, but for times, by number."""
    return {
        row.number: {
            "outcome": row.outcome,
            "state": row.state,
            "params": row.params,
            "values": pytest.approx(row.values, rel=1e-6),
            "history": pytest.approx(dict(row.history), rel=1e-6),
            "metrics": pytest.approx(
                {name: value for name, value in row.metrics.items() if name not in TIMES}, rel=1e-5
            ),
        }
        for row in found.now.rows
    }


_ALONE: dict[str, dict[int, Any]] = {}


def alone(bench: MakeBench, **sections: Any) -> dict[int, Any]:
    """The numbers of the same study without cohorts, which several tests compare with."""
    key = f"{bench.__module__} {json.dumps(sections)}"  # each file has a study of its own
    if key not in _ALONE:
        found = bench("alone", **sections)
        found.worker.run()
        _ALONE[key] = numbers(found)
    return dict(_ALONE[key])


def assert_same(found: Bench, expected: dict[int, Any]) -> None:
    rows = numbers(found)
    assert rows.keys() == expected.keys()
    for number, row in rows.items():
        for what, value in row.items():
            if what in {"outcome", "state", "params"}:
                assert value == expected[number][what], (number, what)
            else:
                assert value.expected == expected[number][what], (number, what)

"""One worker in the test's own process, around a study of its own."""

from __future__ import annotations

from pathlib import Path

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

"""A home folder with finished studies, trained once: real data, store, journal and MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from PIL import Image
from small_data import learnable_images

from sweeper.report.collect import StudyData, collect
from sweeper.report.configurations import configurations, varied
from sweeper.settings import Settings
from sweeper.store import Standing, Store, StoredStudy, TrialRow, open_store, studies, tickets
from sweeper.study.spec import StudySpec
from sweeper.tracking import SpoolTracker
from sweeper.tracking import mlflow as tracker_client
from sweeper.worker import Worker

HOSTILE = (
    """<script>window.owned=1</script> & <img src=http://evil.example/x onerror=window.owned=1>"""
    """ $5_{a}% | `b` \\end"""
)

FACTOR = {
    "name": "factor",
    "description": HOSTILE,
    "data": {"name": "digits", "limit": 300},
    "model": {"name": "mixer", "embed_dim": 12, "blocks": 1},
    "optimizer": {"name": "adam", "lr": 0.01},
    "train": {"epochs": 3, "batch_size": 32},
    "search": {"sampler": "grid"},
    "parameters": {"model.patch": [2, 4], "train.seed": [0, 1]},
    "reference": {
        "source": "R9.9 <b>bold</b>",
        "trials": [
            {
                "params": {"model.patch": 2},
                "reported": {"test_accuracy": 0.2, "model_parameters": 10.0},
                "note": HOSTILE,
            },
            {"params": {"model.patch": 8}, "reported": {"test_accuracy": 0.5}},
        ],
    },
}

SWEEP = {
    "name": "sweep",
    "data": {"name": "digits", "limit": 200},
    "train": {"epochs": 2, "batch_size": 50},
    "model": {"name": "mlp", "width": 16, "layers": 1},
    "search": {"trials": 6, "sampler": {"name": "random"}},
    "parameters": {
        "optimizer.lr": {"low": 1.0e-3, "high": 1.0e-1, "log": True},
        "model.name": ["mlp", "tests.own_models:broken"],
        "train.batch_size": [20, 50],
    },
}

CLASSES = ("<img src=x onerror=window.owned=1>cat", "it's a dog")


def colour(root: Path) -> dict[str, Any]:
    """A convolutional network on colour pictures whose classes have hostile names."""
    for part, count, seed in (("train", 40, 0), ("test", 12, 1)):
        images, labels = learnable_images(count, (8, 8, 3), 2, seed)
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            name = CLASSES[label].replace("/", "∕")
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return {
        "name": "colour",
        "data": {"name": "image_folder", "root": str(root), "validation": 0.25},
        "model": {"name": "cnn", "channels": [8, 8], "hidden": 16, "kernel": 3},
        "optimizer": {"name": "adam", "lr": 0.001},
        "train": {"epochs": 1, "batch_size": 16},
        "search": {"trials": 1},
    }


@dataclass(frozen=True, kw_only=True)
class Home:
    """Settings and the open store of a home folder with finished studies."""

    settings: Settings
    store: Store

    def data(self, name: str) -> StudyData:
        """Everything that a report says of the study, as if ``launch`` had just ended it."""
        study = studies.load(self.store, name)
        return collect(self.store, study, self.settings, command=f"sweeper launch {name}.yaml")

    def run(self, sections: dict[str, Any]) -> StudySpec:
        """Train every trial of a study, the published ones only as grid points."""
        spec = StudySpec.model_validate(sections)
        uri = self.settings.embedded_tracking_uri
        client = tracker_client.connect(uri)
        client.create_experiment(
            spec.name, artifact_location=(self.settings.artifacts / spec.name).as_uri()
        )
        with self.store.exclusively():
            study = studies.create(self.store, spec)
            if study is None:
                raise ValueError(f"{spec.name} is there already")
            tickets.fill(self.store, study.id, spec, tickets.tickets(spec, with_reference=False))
        with SpoolTracker(self.settings.spool, uri, gather_s=0.05) as tracker:
            Worker(
                store=self.store,
                tracker=tracker,
                settings=self.settings,
                study=spec.name,
                name="worker <1>",
                allow_imports=True,
            ).run()
            if tracker.flush(60):
                raise TimeoutError("MLflow did not take what was trained")
        return spec


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The studies ``factor``, ``sweep`` and ``colour``, trained."""
    folder = tmp_path_factory.mktemp("a home")
    settings = Settings.resolve(home=folder, environment={"SWEEPER_DATA": str(folder / "data")})
    store = open_store(settings.store_url)
    found = Home(settings=settings, store=store)
    for sections in (FACTOR, SWEEP, colour(folder / "pictures")):
        found.run(sections)
    yield found
    store.close()


@pytest.fixture
def data(home: Home) -> Callable[[str], StudyData]:
    return home.data


NOON = datetime(2026, 11, 21, 12)


def row(number: int, **facts: Any) -> TrialRow:
    """A completed trial of one minute on one worker, unless ``facts`` say otherwise."""
    accuracy = facts.pop("accuracy", None)
    known: dict[str, Any] = {
        "state": "complete",
        "params": {},
        "metrics": {} if accuracy is None else {"test_accuracy": accuracy},
        "values": () if accuracy is None else (accuracy,),
        "epoch": 1,
        "last_value": None,
        "history": {},
        "seconds": 60.0,
        "started": NOON + timedelta(minutes=number),
        "ended": NOON + timedelta(minutes=number + 1),
        "attempt": 1,
        "origin": number,
        "run_id": None,
        "worker": "w",
        "outcome": "completed",
        "error": None,
        "model_parameters": None,
    }
    return TrialRow(number=number, **{**known, **facts})


SMALL = {"name": "small", "data": {"name": "digits"}, "model": {"name": "mlp"}}


def made(*rows: TrialRow, **sections: Any) -> StudyData:
    """What a report sees of a study with these trials, which nobody trained."""
    spec = StudySpec.model_validate({**SMALL, **sections})
    found = configurations(spec, rows)
    return StudyData(
        study=StoredStudy(study=optuna.create_study(study_name=spec.name), spec=spec),
        now=Standing(spec=spec, rows=rows),
        found=found,
        factors=tuple(varied(spec, [(config.resolved, config.params) for config in found])),
    )

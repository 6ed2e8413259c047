"""What every tracker promises, checked over the one in memory and the real one with its server."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sweeper.settings import NONFINITE_TAG, STATE_TAG
from sweeper.tracking import MemoryTracker, RunStart, SpoolTracker
from sweeper.tracking import mlflow as server

Begin = Callable[..., RunStart]
NOW = 1_790_000_000_000


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run as the outside sees it. ``metrics``: name → [(step, value, time), …] by step."""

    status: str
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, list[tuple[int, float, int]]]
    files: dict[str, bytes]
    datasets: list[tuple[str, str]]


class InMemory:
    def __init__(self) -> None:
        self.tracker = MemoryTracker()

    def see(self, start: RunStart) -> Seen:
        run = self.tracker.runs[start.key]
        return Seen(
            status=run.status,
            name=run.name,
            params=run.params,
            tags=run.tags,
            metrics={
                name: sorted((step, value, at) for step, (value, at) in points.items())
                for name, points in run.metrics.items()
            },
            files=run.files,
            datasets=[(str(d["name"]), str(d["digest"])) for d in run.datasets],
        )


class OnServer:
    def __init__(self, spool: Path, address: str) -> None:
        self.tracker = SpoolTracker(spool, address, gather_s=0.05)
        self.client = server.connect(address)
        self.folder = spool.with_name("downloads")

    def see(self, start: RunStart) -> Seen:
        assert self.tracker.flush(30) == 0
        run_id = server.run_ids(self.client, start.experiment)[start.key]
        run = server.get_run(self.client, run_id)
        files = {}
        for info in self.client.list_artifacts(run_id):
            inside = self.client.list_artifacts(run_id, info.path) if info.is_dir else [info]
            for file in inside:
                copy = server.download_artifact(self.client, run_id, file.path, self.folder)
                files[file.path] = copy.read_bytes()
        return Seen(
            status=run.info.status,
            name=run.info.run_name,
            params=run.data.params,
            tags=run.data.tags,
            metrics={
                name: sorted(
                    (point.step, point.value, point.timestamp)
                    for point in self.client.get_metric_history(run_id, name)
                )
                for name in run.data.metrics
            },
            files=files,
            datasets=[(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs],
        )


@pytest.fixture(params=["memory", pytest.param("server", marks=pytest.mark.mlflow)])
def place(request: pytest.FixtureRequest, nasty_folder: Path) -> Iterator[InMemory | OnServer]:
    if request.param == "memory":
        yield InMemory()
        return
    real = OnServer(nasty_folder / "spool", request.getfixturevalue("mlflow_server"))
    yield real
    assert real.tracker.close() == 0


def test_a_whole_trial_arrives(place: InMemory | OnServer, begin: Begin, tmp_path: Path) -> None:
    start = begin(
        params={
            "optimizer.lr": 1e-3,
            "model.name": "mixer",
            "augment": ["crop", "flip"],
            "x": None,
        },
        tags={STATE_TAG: "running"},
        dataset={
            "name": "cifar10",
            "digest": "0123abcd",
            "source": "/data/cifar10",
            "train": 45000,
        },
    )
    notes = tmp_path / "notes.txt"
    notes.write_text("it's fine")
    place.tracker.start(start)
    for epoch in (1, 2, 3):
        place.tracker.log(
            start.key, {"val_loss": 1 / epoch, "lr": 0.1}, epoch, start.start_time_ms + epoch
        )
    place.tracker.note(start.key, tags={"sweeper.note.x": "y"}, metrics={"model_parameters": 7.0})
    place.tracker.artifact(start.key, notes, "texts")
    place.tracker.artifact(start.key, notes)
    notes.unlink()  # the tracker has its own copy
    place.tracker.end(
        start.key,
        status="FINISHED",
        metrics={"test_accuracy": 0.75},
        tags={STATE_TAG: "finished"},
        end_time_ms=start.start_time_ms + 4,
    )

    seen = place.see(start)
    assert seen.status == "FINISHED"
    assert seen.name == "0001"
    assert seen.params == {
        "optimizer.lr": "0.001",
        "model.name": "mixer",
        "augment": '["crop", "flip"]',
        "x": "null",
    }
    assert seen.tags[STATE_TAG] == "finished"
    assert seen.tags["sweeper.note.x"] == "y"
    t = start.start_time_ms
    assert seen.metrics["val_loss"] == [(1, 1.0, t + 1), (2, 0.5, t + 2), (3, 1 / 3, t + 3)]
    assert seen.metrics["test_accuracy"] == [(3, 0.75, t + 4)]
    assert [(step, value) for step, value, _ in seen.metrics["model_parameters"]] == [(0, 7.0)]
    assert seen.files == {"texts/notes.txt": b"it's fine", "notes.txt": b"it's fine"}
    assert seen.datasets == [("cifar10", "0123abcd")]


def test_a_run_started_again_goes_on_in_the_same_run(
    place: InMemory | OnServer, begin: Begin
) -> None:
    first = begin(at_ms=NOW, params={"lr": 0.1}, tags={"attempt": "1"})
    place.tracker.start(first)
    for epoch in (1, 2, 3):
        place.tracker.log(first.key, {"val_loss": float(epoch)}, epoch, NOW + epoch)
    place.tracker.end(first.key, status="KILLED", end_time_ms=NOW + 10)
    assert place.see(first).status == "KILLED"

    second = begin(at_ms=NOW + 100, params={"lr": 0.1}, tags={"attempt": "2"})
    place.tracker.start(second)
    for epoch in (3, 4):  # from the checkpoint of epoch 2: epoch 3 is measured a second time
        place.tracker.log(second.key, {"val_loss": 30.0 + epoch}, epoch, NOW + 100 + epoch)
    assert place.see(second).status == "RUNNING"
    place.tracker.end(second.key, status="FINISHED", end_time_ms=NOW + 200)

    seen = place.see(second)
    assert seen.status == "FINISHED"
    assert seen.tags["attempt"] == "2"
    assert [point[:2] for point in seen.metrics["val_loss"]] == [(1, 1), (2, 2), (3, 3), (4, 34)]


def test_values_that_are_not_finite_are_a_gap_and_a_tag(
    place: InMemory | OnServer, begin: Begin
) -> None:
    start = begin()
    place.tracker.start(start)
    place.tracker.log(start.key, {"a": 1.0, "b": 2.0}, 1, NOW + 1)
    place.tracker.log(start.key, {"a": math.inf, "b": 2.5}, 2, NOW + 2)
    place.tracker.log(start.key, {"a": -math.inf, "b": math.nan}, 3, NOW + 3)

    seen = place.see(start)
    values = [value for _, value, _ in seen.metrics["a"]]
    assert values[0] == 1.0
    assert math.isnan(values[1])
    assert math.isnan(values[2])
    assert seen.metrics["b"][1][1] == 2.5
    assert seen.tags[NONFINITE_TAG] == "a=inf at step 2; b=nan at step 3"


def test_a_parameter_keeps_its_first_value(place: InMemory | OnServer, begin: Begin) -> None:
    start = begin(params={"lr": 0.1, "batch": 32})
    place.tracker.start(start)
    place.tracker.note(start.key, params={"lr": 0.2, "late": True}, tags={"kept": "yes"})

    seen = place.see(start)
    assert seen.params == {"lr": "0.1", "batch": "32", "late": "true"}
    assert seen.tags["kept"] == "yes"


def test_a_run_must_be_started_first(place: InMemory | OnServer, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("x")
    for call in (
        lambda: place.tracker.log("s/1", {"a": 1.0}, 1, NOW),
        lambda: place.tracker.note("s/1", tags={"a": "b"}),
        lambda: place.tracker.artifact("s/1", file),
        lambda: place.tracker.end("s/1", status="FINISHED", end_time_ms=NOW),
    ):
        with pytest.raises(ValueError, match="must be started before"):
            call()


def test_a_run_ends_as_mlflow_knows_it(place: InMemory | OnServer, begin: Begin) -> None:
    start = begin()
    place.tracker.start(start)
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        place.tracker.end(start.key, status="DONE", end_time_ms=NOW)


def test_many_runs_at_once_stay_apart(place: InMemory | OnServer, begin: Begin) -> None:
    starts = [begin(number) for number in range(8)]
    for start in starts:
        place.tracker.start(start)
    for epoch in range(1, 4):
        for number, start in enumerate(starts):
            place.tracker.log(start.key, {"a": number + epoch / 10}, epoch, NOW + epoch)
    for number, start in enumerate(starts):
        seen = place.see(start)
        assert [value for _, value, _ in seen.metrics["a"]] == [
            number + epoch / 10 for epoch in range(1, 4)
        ]


def test_no_call_waits(place: InMemory | OnServer, begin: Begin) -> None:
    start = begin()
    place.tracker.start(start)
    took = []
    for epoch in range(1, 200):
        began = time.perf_counter()
        place.tracker.log(start.key, {"a": 1.0, "b": 2.0}, epoch, NOW + epoch)
        took.append(time.perf_counter() - began)
    assert sorted(took)[100] < 1e-3  # the median; 20–30 µs on an idle machine

"""One worker that trains several trials at once: each ends as if it had been trained alone."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from worker_bench import Bench, MakeBench, alone, assert_same, numbers

from sweeper.store import Control, Store, held, recovery, studies, workers
from sweeper.store.workers import Presence
from sweeper.training import compiling
from sweeper.training.cohort import Choice, ready
from sweeper.training.cohort.engine import CohortEngine
from sweeper.training.engine import Engine
from sweeper.worker.signals import StopNowError

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1e-2, 2e-2]
GRID: dict[str, Any] = {
    "model": {"name": "mlp", "width": 16, "layers": 1, "dropout": 0.2, "norm": "batch"},
    "train": {"epochs": 3, "batch_size": 50, "precision": "float64"},
    "parameters": {"optimizer.lr": {"values": RATES}},
    "search": {"sampler": "grid"},
    "faults": {"checkpoint_s": 0},
}


@pytest.fixture
def bench(tmp_path: Path) -> MakeBench:
    return lambda name="home", **sections: Bench(tmp_path / name, **{**GRID, **sections})


def sizes(found: Bench) -> Counter[str]:
    """How many trials each cohort had, by its name."""
    runs = found.tracker.runs.values()
    return Counter(run.tags["sweeper.cohort"] for run in runs if "sweeper.cohort" in run.tags)


def test_a_grid_is_trained_by_structure_and_gives_what_single_trials_give(
    bench: MakeBench,
) -> None:
    """The width is the last parameter, so that neighbours in the queue never fit together."""
    parameters = {**GRID["parameters"], "model.width": {"values": [16, 8]}}
    found = bench(parameters=parameters, resources={"cohort": 4})
    found.worker.run()
    assert_same(found, alone(bench, parameters=parameters))
    assert sorted(sizes(found).values()) == [6, 6]
    for cohort in sizes(found):
        widths = {
            run.params["model.width"]
            for run in found.tracker.runs.values()
            if run.tags["sweeper.cohort"] == cohort
        }
        assert len(widths) == 1
    assert {row.attempt for row in found.now.rows} == {1}


def test_a_worker_leaves_the_others_their_share(bench: MakeBench) -> None:
    """Six trials, and another worker that waits for some: no more than three at once."""
    found = bench(resources={"cohort": 6})
    other = Presence(name="other", host="h", pid=1, device="cpu", launcher="manual")
    workers.tell(found.store, other)
    at_once: list[int] = []
    original = CohortEngine.training

    def training(engine: CohortEngine, **arguments: Any) -> Any:
        at_once.append(len(engine.seats))
        return original(engine, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CohortEngine, "training", training)
        found.worker.run()
    assert found.now.counts["complete"] == 6
    assert at_once[:3] == [3, 3, 3]
    assert max(at_once) == 3


def test_auto_measures_only_where_company_is_to_be_expected(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three grid points of each width; a device that is no CPU is pretended."""
    choice = Choice(way="cohort", size=2, beside=1)
    monkeypatch.setattr("sweeper.worker.cohorts.measured_choice", lambda *arguments: choice)
    monkeypatch.setattr("sweeper.worker.cohorts.fuses_by_itself", lambda device: True)
    found = bench(
        resources={"cohort": "auto"},
        parameters={"model.width": {"values": [16, 8]}, "train.seed": {"values": [0, 1, 2]}},
        search={"sampler": "grid"},
    )
    found.worker.run()
    assert sorted(sizes(found).values()) == [3, 3]
    tags = [run.tags.get("sweeper.note.cohort") for run in found.tracker.runs.values()]
    assert tags == [None] * 6


def test_auto_does_not_measure_for_a_trial_without_company(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any, **further: Any) -> int:
        raise RuntimeError("measured for nothing")

    monkeypatch.setattr("sweeper.worker.cohorts.measured_choice", measured)
    monkeypatch.setattr("sweeper.worker.cohorts.fuses_by_itself", lambda device: True)
    found = bench(resources={"cohort": "auto"}, parameters={"model.width": {"values": [16]}})
    found.worker.run()
    assert found.now.counts["complete"] == 1
    for run in found.tracker.runs.values():
        assert "no other trial is known" in run.tags["sweeper.note.cohort"]


def test_a_sampler_is_asked_in_the_order_of_the_queue(bench: MakeBench) -> None:
    """Of another structure one trial is drawn ahead, and none is put back for it."""
    sections: dict[str, Any] = {
        "search": {"sampler": "random", "trials": 8},
        "parameters": {
            "optimizer.lr": {"low": 1e-3, "high": 1e-2, "log": True},
            "model.width": {"values": [16, 8]},
        },
    }
    found = bench(**sections, resources={"cohort": 3})
    drawn_at_once: list[int] = []
    original = found.tracker.log

    def log(key: str, metrics: dict[str, float], step: int, timestamp_ms: int) -> None:
        original(key, metrics, step, timestamp_ms)
        rows = [row for row in found.now.rows if row.state == "running"]
        cohorts = {row.params["model.width"] for row in rows}
        if len(cohorts) == 2:
            drawn_at_once.append(min(Counter(row.params["model.width"] for row in rows).values()))

    found.tracker.log = log  # type: ignore[method-assign]
    found.worker.run()
    assert_same(found, alone(bench, **sections))
    assert {row.attempt for row in found.now.rows} == {1}
    assert set(drawn_at_once) == {1}


def test_a_space_of_numbers_keeps_the_cohort_full(bench: MakeBench) -> None:
    sections: dict[str, Any] = {
        "search": {"sampler": "tpe", "trials": 9},
        "parameters": {"optimizer.lr": {"low": 1e-3, "high": 1e-2, "log": True}},
    }
    found = bench(**sections, resources={"cohort": 4})
    found.worker.run()
    assert found.now.counts["complete"] == 9
    assert list(sizes(found).values()) == [9]
    assert all(sorted(run.metrics["val_loss"]) == [1, 2, 3] for run in found.tracker.runs.values())


def test_members_are_pruned_and_diverge_alone(bench: MakeBench) -> None:
    sections: dict[str, Any] = {
        "optimizer": {"name": "sgd"},
        "parameters": {"optimizer.lr": {"values": [1e-9, 1e300, 0.05, 0.1, 1e-8, 0.2]}},
        "search": {
            "sampler": "grid",
            "pruner": {"name": "threshold", "lower": 0.3, "min_epochs": 2},
        },
    }
    found = bench(**sections, resources={"cohort": 3})
    found.worker.run()
    outcomes = [row.outcome for row in found.now.rows]
    assert outcomes == ["pruned", "diverged", *["completed"] * 2, "pruned", "completed"]
    assert_same(found, alone(bench, **sections))
    assert [found.tracker.runs[f"small/{n}"].status for n in range(6)] == ["FINISHED"] * 6


@pytest.mark.parametrize("grace_s", [30, 0])
def test_a_signal_puts_all_back_and_they_go_on_as_never_broken(
    grace_s: int, bench: MakeBench
) -> None:
    """With no grace, in the middle of the third epoch."""
    faults = {"checkpoint_s": 1000, "grace_s": grace_s}
    found = bench(resources={"cohort": 6}, faults=faults)
    original = CohortEngine._step
    steps = iter(range(1, 1000))

    def step(engine: CohortEngine, index: Any) -> None:
        original(engine, index)
        if next(steps) == (5 if grace_s else 9):
            found.signals.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CohortEngine, "_step", step)
        found.worker.run()
    assert [row.state for row in found.now.rows] == ["waiting"] * 6
    assert {found.tracker.runs[f"small/{n}"].status for n in range(6)} == {"KILLED"}
    found.signals.count = 0
    found.worker.run()
    assert {row.attempt for row in found.now.rows} == {2}
    for run in found.tracker.runs.values():
        assert run.tags["sweeper.resumed"] == "attempt 2 after epoch 2"
    assert_same(found, alone(bench))


def test_a_second_signal_while_an_epoch_is_told_of_costs_no_epoch(bench: MakeBench) -> None:
    found = bench(resources={"cohort": 6})
    original = found.tracker.log

    def log(key: str, metrics: dict[str, float], step: int, timestamp_ms: int) -> None:
        original(key, metrics, step, timestamp_ms)
        if step == 2:  # the first member has been told of, the others have not
            found.signals.count = 2
            raise StopNowError

    found.tracker.log = log  # type: ignore[method-assign]
    found.worker.run()
    found.tracker.log = original  # type: ignore[method-assign]
    assert [row.state for row in found.now.rows] == ["waiting"] * 6
    found.signals.count = 0
    found.worker.run()
    assert_same(found, alone(bench))
    assert all(sorted(run.metrics["val_loss"]) == [1, 2, 3] for run in found.tracker.runs.values())


def test_what_a_cohort_began_goes_on_alone(bench: MakeBench) -> None:
    found = bench(resources={"cohort": 6})
    original = found.tracker.log

    def log(key: str, metrics: dict[str, float], step: int, timestamp_ms: int) -> None:
        original(key, metrics, step, timestamp_ms)
        if step == 2:
            found.signals.stop()

    found.tracker.log = log  # type: ignore[method-assign]
    found.worker.run()
    found.tracker.log = original  # type: ignore[method-assign]
    found.signals.count = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CohortEngine, "__init__", None)
        patch.setattr("sweeper.worker.cohorts.Cohorts.around", lambda cohorts, attempt: None)
        found.worker.run()
    assert_same(found, alone(bench))


def test_a_cohort_reports_every_epoch_in_one_transaction(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"sampler": "grid", "pruner": {"name": "median"}}
    found = bench(resources={"cohort": 6}, search=search)
    sizes: list[int] = []
    report_all = held.report_all

    def counted(store: Store, reports: Mapping[int, Mapping[int, float]]) -> set[int]:
        sizes.append(len(reports))
        return report_all(store, reports)

    monkeypatch.setattr(held, "report_all", counted)
    found.worker.run()
    assert sizes == [6, 6, 6]
    assert [sorted(row.history) for row in found.now.rows] == [[1, 2, 3]] * 6


def test_a_lost_member_is_dropped_and_the_others_go_on(bench: MakeBench) -> None:
    found = bench(resources={"cohort": 6}, faults={"retries": 0})
    original = found.tracker.log

    def log(key: str, metrics: dict[str, float], step: int, timestamp_ms: int) -> None:
        original(key, metrics, step, timestamp_ms)
        if (key, step) == ("small/2", 2):
            number = next(row.number for row in found.now.rows if row.number == 2)
            trial = found.store.storage.get_all_trials(found.study.id)[number]
            assert recovery._lose(found.store, trial._trial_id)

    found.tracker.log = log  # type: ignore[method-assign]
    found.worker.run()
    outcomes = {row.number: row.outcome for row in found.now.rows}
    assert outcomes.pop(2) == "lost"
    assert set(outcomes.values()) == {"completed"}


def test_a_cancelled_study_ends_every_member(bench: MakeBench) -> None:
    found = bench(
        resources={"cohort": 3},
        train={"epochs": 500, "batch_size": 50},
        faults={"heartbeat_s": 1},
    )

    def log(key: str, metrics: object, step: int, timestamp_ms: int) -> None:
        if (key, step) == ("small/0", 1):
            studies.ask(found.store, found.study.id, Control.CANCEL)

    found.tracker.log = log  # type: ignore[method-assign]
    found.worker.run()
    assert Counter(row.outcome for row in found.now.rows) == {"cancelled": 3, None: 3}


def test_too_little_memory_halves_the_cohort_and_nothing_is_lost(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = CohortEngine._step
    steps = iter(range(1, 1000))

    def step(engine: CohortEngine, index: Any) -> None:
        original(engine, index)
        if next(steps) > 5 and len(engine.seats) > 2:  # in the middle of the second epoch
            raise MemoryError("no room for so many")

    monkeypatch.setattr(CohortEngine, "_step", step)
    found = bench(resources={"cohort": 5})
    found.worker.run()
    monkeypatch.undo()
    assert "memory is too small for 4 trials, 2 go on: no room for so many" in caplog.text
    assert [row.attempt for row in found.now.rows] == [1, 1, 2, 2, 2, 1]
    assert_same(found, alone(bench))


def test_memory_too_small_for_one_ends_as_alone(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(engine: CohortEngine, index: Any) -> None:
        raise MemoryError("no room at all")

    monkeypatch.setattr(CohortEngine, "_step", step)
    found = bench(
        resources={"cohort": 2},
        parameters={"optimizer.lr": {"values": [1e-3, 2e-3]}},
        faults={"on_out_of_memory": "fail"},
    )
    found.worker.run()
    assert {row.outcome for row in found.now.rows} == {"out_of_memory", "completed"}


def test_after_a_crash_each_is_trained_alone_and_the_guilty_one_is_found(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = alone(bench)
    guilty = RATES[2]
    fused, single = CohortEngine._step, Engine.train

    def step(engine: CohortEngine, index: Any) -> None:
        fused(engine, index)
        if any(seat.config.optimizer.lr == guilty for seat in engine.seats):
            raise RuntimeError("an illegal instruction")

    def train(engine: Engine, **arguments: Any) -> Any:
        if engine._config.optimizer.lr == guilty:
            raise RuntimeError("an illegal instruction")
        return single(engine, **arguments)

    monkeypatch.setattr(CohortEngine, "_step", step)
    monkeypatch.setattr(Engine, "train", train)
    found = bench(resources={"cohort": 4})
    found.worker.run()
    rows = {row.number: row for row in found.now.rows}
    assert rows[2].outcome == "crashed"
    assert "an illegal instruction" in (rows[2].error or "")
    assert "the cohort broke, its trials are trained one by one" in caplog.text
    del expected[2]
    others = numbers(found)
    assert others.pop(2)["state"] == "failed"
    for number, row in others.items():
        assert row["outcome"] == "completed"
        assert row["values"].expected == expected[number]["values"]


SEEDS = {"train.seed": {"values": [0, 1, 2, 3, 4, 5]}}


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"name": "svm"}, "parameters": SEEDS}, "a support vector machine"),
        ({"objective": ["val_accuracy", "seconds"]}, "the objective seconds depends on"),
    ],
)
def test_what_has_to_train_alone_does_and_the_log_says_why(
    sections: dict[str, Any], reason: str, bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = bench(**sections, resources={"cohort": 4})
    found.worker.run()
    assert found.now.counts["complete"] == 6
    assert not sizes(found)
    assert f"trial 0 trains alone: {reason}" in caplog.text
    assert reason in found.tracker.runs["small/0"].tags["sweeper.note.cohort"]


def test_auto_is_one_on_a_cpu(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = bench(resources={"cohort": "auto"})
    found.worker.run()
    assert found.now.counts["complete"] == 6
    assert not sizes(found)


def test_a_member_that_cannot_be_built_fails_alone(bench: MakeBench) -> None:
    """An eps of zero makes no sense to the configuration, which is read when it is claimed."""
    found = bench(
        parameters={"optimizer.eps": {"values": [1e-8, 0.0, 1e-6]}}, resources={"cohort": 3}
    )
    found.worker.run()
    assert [row.outcome for row in found.now.rows] == ["completed", "invalid", "completed"]


def test_auto_compiles_the_step_of_a_cohort_where_that_repays(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six trials, three at once: what was measured for one batch of three is in the home folder."""
    monkeypatch.setattr(compiling, "TRY_S", {"cpu": 0.0})
    monkeypatch.setattr(compiling, "FEWEST_STEPS", 1)
    monkeypatch.setattr(ready, "compiled", lambda losses, _: lambda *arguments: losses(*arguments))
    steps = iter([0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9])
    monkeypatch.setattr(ready.ReadyCohort, "step_s", lambda _: next(steps))
    train = {**GRID["train"], "compile": "auto"}
    found = bench(train=train, resources={"cohort": 3})
    found.worker.run()
    assert_same(found, alone(bench))
    ((key, gain),) = json.loads(found.worker.settings.compile_gains.read_text()).items()
    assert key.startswith("3 x ")
    assert gain["compiled_s"] == 0.1

"""One worker that trains trials of different structures side by side: each as if alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_bench import Bench, MakeBench, alone, assert_same

from sweeper.config import TrialConfig
from sweeper.training import CaptureError
from sweeper.training.cohort import Choice
from sweeper.training.crew import Crew
from sweeper.training.engine import Engine
from sweeper.training.turns import Steps
from sweeper.worker.attempt import Attempt
from sweeper.worker.cohorts import Cohorts, out_of_memory
from sweeper.worker.together import Together
from sweeper.worker.work import Work

BASE: dict[str, Any] = {
    "model": {"name": "mlp", "layers": 1, "dropout": 0.2},
    "train": {"epochs": 3, "batch_size": 50, "precision": "float64"},
    "parameters": {
        "model.width": {"values": [16, 8, 12]},
        "optimizer.name": {"values": ["adam", "rmsprop"]},
    },
    "search": {"sampler": "grid"},
    "faults": {"checkpoint_s": 0},
}
"""Six structures; no cohort takes rmsprop."""


@pytest.fixture
def bench(tmp_path: Path) -> MakeBench:
    return lambda name="home", **sections: Bench(tmp_path / name, **{**BASE, **sections})


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sizes of all lanes, at every epoch of the crew."""
    seen: list[list[int]] = []
    original = Crew.epoch

    def epoch(crew: Crew, **further: Any) -> Any:
        seen.append([count for _, count in crew.lanes() if count])
        return original(crew, **further)

    monkeypatch.setattr(Crew, "epoch", epoch)
    return seen


def company(found: Bench) -> dict[int, str]:
    tags = {int(key.split("/")[1]): run.tags for key, run in found.tracker.runs.items()}
    return {number: tags[number].get("sweeper.company", "") for number in sorted(tags)}


def test_a_mixed_grid_gives_what_single_trials_give(
    bench: MakeBench, at_once: list[list[int]]
) -> None:
    found = bench(resources={"cohort": 3})
    found.worker.run()
    assert_same(found, alone(bench))
    assert {row.attempt for row in found.now.rows} == {1}
    assert max(at_once) == [1, 1, 1]
    assert max(sum(lanes) for lanes in at_once) == 3
    assert company(found)[0].startswith("beside trials ")
    assert all(company(found).values())


def test_a_sampled_structure_is_drawn_in_the_order_of_the_queue(
    bench: MakeBench, at_once: list[list[int]]
) -> None:
    """Those of one structure as one batch, the others beside them; none is put back."""
    sections: dict[str, Any] = {
        "search": {"sampler": "random", "trials": 8, "seed": 1},
        "parameters": {
            "model.width": {"values": [16, 8]},
            "optimizer.lr": {"low": 1e-3, "high": 1e-2, "log": True},
        },
    }
    found = bench(**sections, resources={"cohort": 4})
    found.worker.run()
    assert_same(found, alone(bench, **sections))
    assert {row.attempt for row in found.now.rows} == {1}
    assert max(len(lanes) for lanes in at_once) == 2
    assert max(max(lanes) for lanes in at_once) > 1
    assert max(sum(lanes) for lanes in at_once) == 4
    assert any(
        "in one batch with" in text and " and beside " in text for text in company(found).values()
    )
    for run in found.tracker.runs.values():
        batch = run.tags["sweeper.cohort"]
        mates = [
            each for each in found.tracker.runs.values() if each.tags["sweeper.cohort"] == batch
        ]
        assert len({each.params["model.width"] for each in mates}) == 1


@pytest.mark.parametrize("grace_s", [30, 0])
def test_a_signal_puts_all_back_and_they_go_on_as_never_broken(
    grace_s: int, bench: MakeBench
) -> None:
    """With no grace, in the middle of everybody's epoch."""
    found = bench(resources={"cohort": 6}, faults={"checkpoint_s": 1000, "grace_s": grace_s})
    original = Engine._all_batches
    batches = iter(range(1, 1000))

    def all_batches(engine: Engine) -> Steps[None]:
        for pause in original(engine):
            if next(batches) == 14:
                found.signals.stop()
            yield pause

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_all_batches", all_batches)
        found.worker.run()
    assert {row.state for row in found.now.rows} == {"waiting"}
    assert {run.status for run in found.tracker.runs.values()} == {"KILLED"}
    found.signals.count = 0
    found.worker.run()
    assert {row.attempt for row in found.now.rows} == {2}
    assert sum("sweeper.resumed" in run.tags for run in found.tracker.runs.values()) >= 3
    assert_same(found, alone(bench))


def test_too_little_memory_halves_the_company(
    bench: MakeBench,
    at_once: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the middle of an epoch of one; those that are left go on from where they are."""
    original = Engine._all_batches
    batches = iter(range(1, 1000))

    def all_batches(engine: Engine) -> Steps[None]:
        for pause in original(engine):
            if next(batches) > 12 and sum(at_once[-1]) > 2:
                raise MemoryError("no room for so many")
            yield pause

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_all_batches", all_batches)
        found = bench(resources={"cohort": 4})
        found.worker.run()
    assert "memory is too small for 4 trials, 2 go on: no room for so many" in caplog.text
    assert sorted(row.attempt for row in found.now.rows) == [1, 1, 1, 1, 2, 2]
    assert_same(found, alone(bench))


def test_one_that_finds_no_memory_goes_back_and_the_others_go_on(
    bench: MakeBench,
    at_once: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = Crew.join

    def join(crew: Crew, config: TrialConfig, **further: Any) -> Any:
        if len(crew.members) == 2:
            raise torch.OutOfMemoryError("no room for a third")
        return original(crew, config, **further)

    monkeypatch.setattr(Crew, "join", join)
    found = bench(resources={"cohort": 4})
    found.worker.run()
    assert "memory is too small for trial 2 beside 2: no room for a third" in caplog.text
    assert max(sum(lanes) for lanes in at_once) == 2
    assert_same(found, alone(bench))


def test_one_that_crashes_is_separated_and_its_neighbours_do_not_notice(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = alone(bench)
    original = Engine._all_batches

    def all_batches(engine: Engine) -> Steps[None]:
        config = engine._config
        for pause in original(engine):
            yield pause
            if (config.optimizer.name, getattr(config.model, "width", 0)) == ("rmsprop", 8):
                raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(Engine, "_all_batches", all_batches)
    found = bench(resources={"cohort": 3})
    found.worker.run()
    failed = [row for row in found.now.rows if row.state == "failed"]
    assert [(row.outcome, row.attempt) for row in failed] == [("crashed", 2)]
    assert f"trial {failed[0].number} broke beside others, it is trained by itself" in caplog.text
    others = [row for row in found.now.rows if row.state != "failed"]
    assert {(row.outcome, row.attempt) for row in others} == {("completed", 1)}
    for row in others:
        assert expected[row.number]["values"] == row.values


def test_what_must_be_alone_comes_when_the_others_are_done(
    bench: MakeBench, at_once: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sections: dict[str, Any] = {
        "parameters": {"model.name": {"values": ["mlp", "svm"]}, **SEEDS},
        "model": {"name": "mlp"},
    }
    found = bench(**sections, resources={"cohort": 2})
    found.worker.run()
    assert_same(found, alone(bench, **sections))
    assert caplog.text.count("trains alone: a support vector machine") == 2
    assert max(at_once) == [2]


SEEDS = {"train.seed": {"values": [0, 1]}}


def test_auto_takes_trials_until_the_device_is_full(
    bench: MakeBench, at_once: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured for the first structure of a company only; a device that is no CPU is pretended. One
    of width 12 is known to want the device for itself."""
    measured: list[int] = []
    shares: list[float] = []
    leaders: list[int] = []
    run = Together.run

    def led(together: Together, leader: Attempt) -> Attempt | None:
        leaders.append(leader.configured().model.model_dump()["width"])
        return run(together, leader)

    def choice(
        worker: Any, study: Any, config: TrialConfig, device: torch.device, most: float
    ) -> Choice:
        measured.append(config.model.model_dump()["width"])
        shares.append(most)
        return Choice(way="streams", size=2, beside=2)

    def known(
        worker: Any, study: Any, config: TrialConfig, device: torch.device, most: float
    ) -> Choice | None:
        wide = config.model.model_dump()["width"] == 12
        return Choice(way="cohort", size=4, beside=1) if wide else None

    monkeypatch.setattr(Together, "run", led)
    monkeypatch.setattr("sweeper.worker.cohorts.measured_choice", choice)
    monkeypatch.setattr("sweeper.worker.cohorts.known_choice", known)
    monkeypatch.setattr("sweeper.worker.cohorts.fuses_by_itself", lambda device: True)
    found = bench(resources={"cohort": "auto"})
    found.worker.run()
    assert_same(found, alone(bench))
    assert measured == [width for width in leaders if width != 12]
    assert shares[0] == found.now.budget
    assert measured[0] == 16
    assert max(sum(lanes) for lanes in at_once) == 2
    assert all("12" not in text for text in company(found).values())
    for key, run in found.tracker.runs.items():
        beside = run.tags.get("sweeper.company", "")
        assert bool(beside) == (run.params["model.width"] != 12), key


def test_what_did_not_fit_holds_wherever_the_same_structures_are(bench: MakeBench) -> None:
    found = bench(resources={"cohort": 4})
    cohorts = Cohorts(worker=found.worker, work=Work(store=found.store, worker="me"))
    cohorts.remember_limit({"a", "b"}, 4)
    cohorts.remember_limit({"a"}, 6)
    cohorts.remember_limit({"c"}, 1)
    assert cohorts.limit({"a"}) == 6
    assert cohorts.limit({"b"}) is None
    assert cohorts.limit({"a", "b", "d"}) == 4
    assert cohorts.limit({"a", "b", "c"}) == 1


def test_a_few_structures_of_a_study_are_measured_and_the_others_are_like_the_last(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = [4, 5, 6, 7, 8]
    measured: list[int] = []

    def choice(
        worker: Any, study: Any, config: TrialConfig, device: torch.device, most: float
    ) -> Choice:
        measured.append(config.model.model_dump()["width"])
        return Choice(way="streams", size=measured[-1], beside=measured[-1])

    monkeypatch.setattr("sweeper.worker.cohorts.measured_choice", choice)
    found = bench(resources={"cohort": "auto"})
    cohorts = Cohorts(worker=found.worker, work=Work(store=found.store, worker="me"))
    configs = [found.study.spec.trial_config({"model.width": width}) for width in widths]
    asked = [cohorts.choice(found.study, config, measure=True).size for config in configs]
    assert measured == [4, 5, 6]
    assert asked == [4, 5, 6, 6, 6]
    assert [cohorts.choice(found.study, each, measure=False).size for each in configs] == asked


def test_memory_too_small_for_a_capture_is_memory_too_small() -> None:
    def failed(first: Exception) -> CaptureError:
        """As `sweeper.training.capture` raises it: ending a broken capture raises once more."""
        second, third = RuntimeError("the capture was invalidated"), CaptureError("none")
        second.__context__, third.__cause__ = first, second
        return third

    assert out_of_memory(failed(torch.OutOfMemoryError("no room")))
    assert not out_of_memory(failed(ValueError("something else")))


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [(torch.OutOfMemoryError("no room"), "out_of_memory"), (ValueError("it waits"), "invalid")],
)
def test_a_step_that_cannot_be_captured_is_the_end_of_its_trial_only(
    reason: Exception, outcome: str, bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: object, **__: object) -> None:
        raise CaptureError("the training step cannot be captured") from reason

    monkeypatch.setattr("sweeper.training.prepare", prepare)
    found = bench(
        resources={"cohort": 1}, search={"trials": 2}, faults={"on_out_of_memory": "fail"}
    )
    found.worker.run()
    assert {row.outcome for row in found.now.rows} == {outcome}

"""``train.compile: auto`` in a cohort: the common step is compiled where that repays, or stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trial_bench import Bench, MakeConfig, MakeDataset, assert_equal, varied

from sweeper.config import TrialConfig
from sweeper.measurement import Measurement
from sweeper.training import Compiling, compiling
from sweeper.training.cohort import Cohort, Member
from sweeper.training.cohort import ready as ready_module
from sweeper.training.cohort.ready import Losses, ReadyCohort
from sweeper.training.compiling import lacking

CPU = torch.device("cpu")


@pytest.fixture
def bench(make_config: MakeConfig, make_dataset: MakeDataset) -> Bench:
    return Bench(make_config, make_dataset)


@pytest.fixture
def how(tmp_path: Path) -> Compiling:
    """A study long enough for anything to repay."""
    return Compiling(measured=tmp_path / "gains.json", code=tmp_path / "code", together=10_000)


@pytest.fixture
def step_s(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[bool]]:
    """Steps take what is said, plain and compiled; the list has which were timed."""

    def take(plain: float, compiled: float) -> list[bool]:
        timed: list[bool] = []

        def told(ready: ReadyCohort) -> float:
            timed.append(ready.is_compiled)
            return compiled if ready.is_compiled else plain

        monkeypatch.setattr(ReadyCohort, "step_s", told)
        return timed

    return take


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Losses]:
    """What is to be compiled is taken as it is; the list has all that was."""
    given: list[Losses] = []

    def compiled(losses: Losses, _: torch.device) -> Losses:
        given.append(losses)
        return lambda *arguments: losses(*arguments)

    monkeypatch.setattr(ready_module, "compiled", compiled)
    return given


def joined(
    bench: Bench, how: Compiling | None, *optimizers: str
) -> tuple[Cohort, dict[Member, list[Measurement]]]:
    configs = [
        bench.config(index, varied(index, name), compile="auto")
        for index, name in enumerate(optimizers)
    ]
    cohort = bench.cohort(configs[0], how)
    return cohort, {cohort.join(config): [] for config in configs}


def train(cohort: Cohort, history: dict[Member, list[Measurement]], epochs: int = 1) -> None:
    for _ in range(epochs):
        for member, measurement in cohort.epoch():
            history[member].append(measurement)


def assert_all_as_alone(bench: Bench, history: dict[Member, list[Measurement]]) -> None:
    for member, measured in history.items():
        off = member.config.train.model_copy(update={"compile": "off"})
        alone = bench.alone(member.config.model_copy(update={"train": off}))
        assert_equal(member, measured, alone, list(alone.epochs()))


def remembered(how: Compiling) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(how.measured.read_text())
    return found


@pytest.mark.skipif(lacking(CPU) is not None, reason=f"it cannot be compiled here: {lacking(CPU)}")
def test_what_repays_is_compiled_and_members_get_what_they_get_alone(
    bench: Bench,
    how: Compiling,
    step_s: Callable[[float, float], list[bool]],
) -> None:
    """Measured before the first epoch, by steps that leave no trace; remembered for the next."""
    timed = step_s(2.0, 1.0)
    cohort, history = joined(bench, how, "adamw", "sgd", "nesterov")
    train(cohort, history, epochs=3)
    assert timed == [False, True, False, True, False, True, False]
    assert cohort._open().is_compiled
    assert cohort._open().compiled.startswith("compiled in ")
    assert {member.notes["compile"] for member in history} == {"that of its cohort"}
    assert_all_as_alone(bench, history)
    ((key, gain),) = remembered(how).items()
    assert key.startswith("3 x ")
    assert (gain["eager_s"], gain["compiled_s"]) == (2.0, 1.0)
    assert how.code.is_dir()

    again, more = joined(bench, how, "adamw", "adam", "momentum")
    train(again, more)
    assert again._open().is_compiled
    assert len(timed) == 7


def test_what_does_not_repay_stays_and_is_not_tried_again(
    bench: Bench,
    how: Compiling,
    step_s: Callable[[float, float], list[bool]],
    uncompiled: list[Losses],
) -> None:
    timed = step_s(2.0, 2.0)
    for _ in range(2):
        cohort, history = joined(bench, how, "adamw", "sgd")
        train(cohort, history, epochs=3)
        assert not cohort._open().is_compiled
        assert "a step takes 2e+03 ms without and 2e+03 ms with it" in cohort._open().compiled
        assert_all_as_alone(bench, history)
    assert len(timed) == 7
    assert len(uncompiled) == 1


def test_a_study_that_is_short_costs_one_timing(
    bench: Bench,
    how: Compiling,
    step_s: Callable[[float, float], list[bool]],
    uncompiled: list[Losses],
) -> None:
    """30 steps an epoch and trial, 3 epochs, 40 trials, 2 of them at once: 600 common steps."""
    timed = step_s(0.5, 0.1)
    short = Compiling(measured=how.measured, code=how.code, together=40)
    cohort, history = joined(bench, short, "adamw", "sgd")
    train(cohort, history)
    assert timed == [False]
    assert not uncompiled
    assert "300 s of training with these shapes" in cohort._open().compiled


def test_fewer_trials_at_the_end_are_not_worth_a_thought(
    bench: Bench,
    how: Compiling,
    step_s: Callable[[float, float], list[bool]],
    uncompiled: list[Losses],
) -> None:
    """But a batch that has become larger is."""
    step_s(2.0, 2.0)
    cohort, history = joined(bench, how, "adamw", "sgd", "adam", "adam")
    train(cohort, history)
    members = list(history)
    for member in members[1:3]:
        member.close()
    train(cohort, history)
    assert len(cohort._open().seats) == 2
    assert cohort._open().compiled.endswith("few are to come")
    assert len(uncompiled) == 1
    for name in ("adam", "sgd", "adamw"):
        history[cohort.join(bench.config(0, varied(0, name), compile="auto"))] = []
    train(cohort, history)
    assert len(uncompiled) == 2
    assert sorted(key.split()[0] for key in remembered(how)) == ["4", "5"]


def test_a_refill_that_brings_other_code_has_it_compiled(
    bench: Bench,
    how: Compiling,
    step_s: Callable[[float, float], list[bool]],
    uncompiled: list[Losses],
) -> None:
    """The first two drop nothing and smooth nothing, the third does both."""
    step_s(2.0, 1.0)
    first = bench.config(0, varied(0, "adamw"), compile="auto")
    cohort = bench.cohort(first, how)
    leaving, staying = cohort.join(first), cohort.join(first)
    history: dict[Member, list[Measurement]] = {staying: []}
    history[staying].append(dict(cohort.epoch())[staying])
    assert cohort._open().is_compiled
    leaving.close()
    history[cohort.join(bench.config(1, varied(1, "sgd"), compile="auto"))] = []
    train(cohort, history, epochs=2)
    assert cohort._open().is_compiled
    assert len(uncompiled) == 2
    assert len(remembered(how)) == 2  # smoothed and not
    (other,) = [member for member in history if member is not staying]
    staying.close()
    history.pop(staying)
    train(cohort, history)
    assert_all_as_alone(bench, {other: history[other]})


def test_memory_that_suffices_only_without_is_no_reason_to_train_fewer(
    bench: Bench,
    how: Compiling,
    step_s: Callable[[float, float], list[bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step_s(2.0, 1.0)

    def too_much(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(ready_module, "compiled", lambda *_: too_much)
        cohort, history = joined(bench, how, "adamw", "sgd")
        train(cohort, history, epochs=3)
    assert not cohort._open().is_compiled
    assert "not enough memory" in cohort._open().compiled
    assert_all_as_alone(bench, history)
    monkeypatch.setattr(ready_module, "compiled", lambda losses, _: lambda *given: losses(*given))
    again, more = joined(bench, how, "adamw", "sgd")
    train(again, more)
    assert again._open().is_compiled  # it is not held against the next


def test_memory_too_small_for_the_compiled_step_is_none_for_the_plain_one(
    bench: Bench,
    how: Compiling,
    monkeypatch: pytest.MonkeyPatch,
    uncompiled: list[Losses],
) -> None:
    """It is found out when the step is timed, not when it is compiled."""

    def timed(run: Any, back: Any, device: torch.device) -> float:
        if cohort._open().is_compiled:
            raise torch.OutOfMemoryError("no room")
        return 2.0

    monkeypatch.setattr(ready_module, "fastest", timed)
    cohort, history = joined(bench, how, "adamw", "sgd")
    train(cohort, history, epochs=3)
    assert len(uncompiled) == 1
    assert not cohort._open().is_compiled
    assert "not enough memory" in cohort._open().compiled
    assert_all_as_alone(bench, history)


def test_without_a_home_nothing_is_compiled(bench: Bench, uncompiled: list[Losses]) -> None:
    cohort, history = joined(bench, None, "adamw", "sgd")
    train(cohort, history)
    assert "no home folder" in cohort._open().compiled
    assert not uncompiled


def test_rates_of_dropout_are_no_code_but_whether_anything_drops_is(
    bench: Bench,
    how: Compiling,
    step_s: Callable[[float, float], list[bool]],
    uncompiled: list[Losses],
) -> None:
    """The first member of the second cohort has another rate than that of the first."""
    step_s(2.0, 2.0)

    def cohort_of(*rates: float) -> None:
        def config(rate: float) -> TrialConfig:
            plain = bench.config(0, varied(0, "adam"), compile="auto")
            model = plain.model.model_copy(update={"dropout": rate})
            return plain.model_copy(update={"model": model})

        cohort = bench.cohort(config(rates[0]), how)
        for rate in rates:
            cohort.join(config(rate))
        cohort.epoch()

    cohort_of(0.1, 0.3)
    cohort_of(0.4, 0.0)
    assert len(remembered(how)) == len(uncompiled) == 1
    cohort_of(0.0, 0.0)
    assert len(remembered(how)) == len(uncompiled) == 2


def test_every_step_of_the_rehearsal_leaves_no_trace(
    bench: Bench, how: Compiling, monkeypatch: pytest.MonkeyPatch, uncompiled: list[Losses]
) -> None:
    """Really timed, whatever comes out of it."""
    monkeypatch.setattr(compiling, "TRY_S", {"cpu": 0.0})
    cohort, history = joined(bench, how, "adamw", "sgd", "adam")
    train(cohort, history, epochs=3)
    (gain,) = remembered(how).values()
    assert gain["eager_s"] > 0 < gain["compiled_s"]
    assert len(uncompiled) == 1
    assert_all_as_alone(bench, history)

"""How many trials at once, and how: measured here, remembered, and never at a trial's cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper.config import TrialConfig
from sweeper.data import Dataset
from sweeper.errors import UsageError
from sweeper.training import Compiling
from sweeper.training.cohort import Choice, Way, sizing
from sweeper.training.cohort import choice as choice_module
from sweeper.training.cohort.engine import CohortEngine

CPU = torch.device("cpu")
MakeConfig = Callable[..., TrialConfig]
MakeDataset = Callable[..., Dataset]


@pytest.mark.parametrize(
    ("rates", "size"),
    [
        ({1: 100.0}, 1),
        ({1: 100.0, 4: 104.0}, 1),
        ({1: 100.0, 4: 390.0, 16: 1500.0, 64: 1510.0}, 16),
        ({1: 100.0, 4: 90.0, 16: 300.0}, 16),
        ({1: 100.0, 4: 300.0, 16: 200.0}, 4),
    ],
)
def test_the_smallest_number_that_no_larger_one_clearly_beats(
    rates: dict[int, float], size: int
) -> None:
    assert choice_module.chosen(rates) == size


@pytest.mark.parametrize(
    ("cohort", "streams", "choice"),
    [
        ({1: 100.0}, {1: 100.0}, ("alone", 1, 1)),
        ({1: 100.0, 4: 300.0}, {1: 100.0, 4: 200.0}, ("cohort", 4, 4)),
        ({1: 100.0, 4: 300.0}, {1: 100.0, 4: 90.0}, ("cohort", 4, 1)),
        ({1: 100.0, 4: 110.0}, {1: 100.0, 4: 200.0, 16: 300.0}, ("streams", 16, 16)),
        ({1: 100.0, 4: 200.0}, {1: 100.0, 4: 200.0}, ("cohort", 4, 4)),
        ({}, {}, ("alone", 1, 1)),
    ],
)
def test_the_way_that_is_the_fastest_with_its_best_number(
    cohort: dict[int, float], streams: dict[int, float], choice: tuple[Any, int, int]
) -> None:
    way, size, beside = choice
    found = choice_module.chosen_way({"cohort": cohort, "streams": streams})
    assert found == Choice(way=way, size=size, beside=beside)
    alone = choice_module.chosen_way({"streams": streams})
    assert alone.size == alone.beside == found.beside


def test_it_is_measured_once_and_remembered(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    nasty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config({"name": "mlp", "width": 8, "dropout": 0.1})
    dataset, file = make_dataset(config), nasty_folder / "new" / "cohorts.json"
    monkeypatch.setattr(sizing, "SIZES", (1, 2))
    state = torch.random.get_rng_state()
    choice = sizing.best_way(config, dataset=dataset, device=CPU, file=file)
    assert torch.equal(torch.random.get_rng_state(), state)
    (kept,) = json.loads(file.read_text()).values()
    assert (kept["way"], kept["size"], kept["beside"]) == (choice.way, choice.size, choice.beside)
    for rates in kept["samples_per_s"].values():
        assert set(rates) == {"1", "2"}
        assert all(rate > 0 for rate in rates.values())
    assert set(kept["samples_per_s"]) == {"cohort", "streams"}
    assert [each.name for each in file.parent.iterdir()] == ["cohorts.json"]

    def measured(*_: Any, **__: Any) -> dict[int, float]:
        raise RuntimeError("measured again")

    monkeypatch.setattr(sizing, "throughputs", measured)
    other = make_config({"name": "mlp", "width": 8, "dropout": 0.5}, seed=3)
    assert sizing.best_way(other, dataset=dataset, device=CPU, file=file) == choice
    with pytest.raises(RuntimeError, match="measured again"):
        wider = make_config({"name": "mlp", "width": 9})
        sizing.best_way(wider, dataset=dataset, device=CPU, file=file)
    file.write_text(json.dumps({choice_module._key(wider, CPU): {"size": 4, "samples_per_s": {}}}))
    with pytest.raises(RuntimeError, match="measured again"):  # from before there were two ways
        sizing.best_way(wider, dataset=dataset, device=CPU, file=file)


@pytest.mark.parametrize(
    ("most", "sizes", "up_to"),
    [(2, [1, 4], 4), (4, [1, 4], 4), (5, [1, 4, 16], 16), (64, [1, 4, 16, 64], 64)]
    + [(most, [1, 4, 16, 64, 256], None) for most in (65, 300, math.inf)],
)
def test_numbers_that_the_study_cannot_fill_are_not_tried(
    most: float,
    sizes: list[int],
    up_to: int | None,
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[int]] = []

    def measured(*_: Any, ways: list[Way], sizes: list[int], **__: Any) -> dict[Way, Any]:
        asked.append(list(sizes))
        return {way: {size: float(size) for size in sizes} for way in ways}

    monkeypatch.setattr(sizing, "throughputs", measured)
    monkeypatch.setattr(sizing, "lacking", lambda _: None)
    monkeypatch.setattr(choice_module, "TRY_S", {"cpu": 0.0})
    config = make_config({"name": "mlp", "width": 8}, compile="auto")
    dataset, file = make_dataset(config), tmp_path / "cohorts.json"
    how = Compiling(measured=tmp_path / "gains", code=tmp_path / "code")

    def best(most: float) -> Choice:
        return sizing.best_way(
            config, dataset=dataset, device=CPU, file=file, compiling=how, most=most
        )

    assert best(most).size == sizes[-1]
    (kept,) = json.loads(file.read_text()).values()
    assert kept["up_to"] == up_to
    assert best(2).size == best(sizes[-1]).size == sizes[-1]
    assert asked == [sizes, sizes]  # without and with compiling
    assert best(256).size == 256  # a larger study measures again where that may change something
    assert asked[2:] == ([] if up_to is None else [[1, 4, 16, 64, 256]] * 2)
    (kept,) = json.loads(file.read_text()).values()
    assert (kept["up_to"], kept["compiled_up_to"]) == (None, None)


def test_numbers_that_were_turned_down_are_not_tried_again_for_a_larger_study() -> None:
    slower: dict[Way, dict[int, float]] = {"cohort": {1: 1.0, 4: 2.0, 16: 1.0}}
    measured = choice_module.Measured(rates=slower, images=100, up_to=64)
    assert measured.suffices(64)
    assert measured.suffices(1000)
    assert not measured.compiled_suffices(1)
    further = replace(measured, compiled={1: 1.0, 4: 2.0, 16: 3.0}, compiled_up_to=16)
    assert further.suffices(1000)
    assert further.compiled_suffices(16)
    assert not further.compiled_suffices(17)


def test_compiled_cohorts_are_measured_for_the_study_that_asks(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without compiling four at once are the fastest, as a small study found out."""
    asked: list[tuple[str, list[int]]] = []

    def measured(config: TrialConfig, *, ways: list[Way], sizes: list[int], **_: Any) -> Any:
        asked.append((config.train.compile, list(sizes)))
        if config.train.compile == "on":
            return {way: {size: 10.0 * size for size in sizes} for way in ways}
        return {way: {1: 1.0, 4: 2.0} for way in ways}

    monkeypatch.setattr(sizing, "throughputs", measured)
    monkeypatch.setattr(sizing, "lacking", lambda _: None)
    config = make_config({"name": "mlp", "width": 8}, epochs=3, compile="auto")
    dataset, file = make_dataset(config, train=100), tmp_path / "cohorts.json"

    def best(trials: int) -> Choice:
        """As in a study of so many trials, which are a second each: 2,400 s of them are long."""
        how = Compiling(measured=tmp_path / "gains", code=tmp_path / "code", together=trials)
        return sizing.best_way(
            config, dataset=dataset, device=CPU, file=file, compiling=how, most=trials
        )

    assert best(7).size == 4
    assert asked == [("off", [1, 4, 16])]
    assert best(1000).size == 256
    assert asked[1:] == [("on", [1, 4, 16, 64, 256])]
    assert [best(1000).size, best(10).size, best(7).size] == [256, 256, 4]
    assert len(asked) == 2


def test_a_file_that_cannot_be_used_costs_a_measurement_only(
    make_config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    config = make_config()
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"half')
    blocked = damaged / "below a file" / "cohorts.json"
    for file in (damaged, blocked):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sizing, "throughputs", lambda *_, **__: {"streams": {1: 1.0, 4: 3.0}})
            dataset = make_dataset(config)
            assert sizing.best_way(config, dataset=dataset, device=CPU, file=file).size == 4
    assert len(json.loads(damaged.read_text())) == 1


def test_sizes_that_do_not_fit_are_left_out(
    make_config: MakeConfig, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange, tried = CohortEngine.arrange, []

    def arranged(engine: CohortEngine, seats: list[Any]) -> None:
        tried.append(len(seats))
        if len(seats) > 2:
            raise torch.OutOfMemoryError("too many")
        arrange(engine, seats)

    monkeypatch.setattr(CohortEngine, "arrange", arranged)
    monkeypatch.setattr(sizing, "_seconds", _growing(sizing._seconds))
    config = make_config({"name": "mlp", "width": 8})
    rates = sizing.throughputs(
        config, dataset=make_dataset(config), device=CPU, sizes=(1, 2, 4, 64), batches=1
    )
    assert list(rates["cohort"]) == [1, 2]
    assert list(rates["streams"]) == [1, 2, 4]  # torch has no 64 streams
    assert tried == [2, 4]


def _growing(measure: Callable[..., float]) -> Callable[..., float]:
    """The measurement as it is, with a time in which more trials are always faster."""

    def seconds(
        config: TrialConfig,
        dataset: Dataset,
        device: torch.device,
        size: int,
        way: Way,
        compiling: Compiling | None,
    ) -> float:
        assert measure(config, dataset, device, size, way, compiling) > 0
        return 1.0 / size

    return seconds


def test_lanes_are_not_measured_where_each_would_compile_its_own_step(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: list[tuple[Way, Compiling | None]] = []

    def seconds(*arguments: Any) -> float:
        asked.append((arguments[4], arguments[5]))
        return 1.0

    monkeypatch.setattr(sizing, "_seconds", seconds)
    config = make_config(compile="on")
    how = Compiling(measured=tmp_path / "compiled.json", code=tmp_path / "compiled")
    choice = sizing.best_way(
        config,
        dataset=make_dataset(config),
        device=CPU,
        file=tmp_path / "cohorts.json",
        compiling=how,
    )
    assert (choice.way, choice.beside) == ("cohort", 1)
    assert {way for way, _ in asked} == {"alone", "cohort"}
    assert {kept for _, kept in asked} == {how}


def test_a_size_that_cannot_be_compiled_ends_the_search_and_no_trial(
    make_config: MakeConfig, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(*arguments: Any) -> float:
        if arguments[3] == 16:
            raise UsageError("train.compile: on cannot be done: too many")
        return 1.0

    monkeypatch.setattr(sizing, "_seconds", seconds)
    config = make_config(compile="on")
    rates = sizing.throughputs(
        config, dataset=make_dataset(config), device=CPU, ways=["cohort"], sizes=(1, 4, 16, 64)
    )
    assert list(rates["cohort"]) == [1, 4]


def test_a_worker_that_is_to_end_measures_no_more_and_remembers_nothing(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The signal comes with the second number of the first way."""
    sizes: list[int] = []

    def seconds(*arguments: Any) -> float:
        sizes.append(arguments[3])
        return 1.0

    monkeypatch.setattr(sizing, "_seconds", seconds)
    config, file = make_config(), tmp_path / "cohorts.json"
    choice = sizing.best_way(
        config,
        dataset=make_dataset(config),
        device=CPU,
        file=file,
        stop=lambda: 4 in sizes,
    )
    assert choice == Choice(way="alone", size=1, beside=1)
    assert sizes == [1, 4]
    assert not file.exists()


def test_slower_sizes_end_the_search(
    make_config: MakeConfig, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sizing, "_seconds", lambda *arguments: {1: 1.0, 2: 1.0, 4: 3.0}[arguments[3]]
    )
    config = make_config()
    rates = sizing.throughputs(config, dataset=make_dataset(config), device=CPU, sizes=(1, 2, 4, 8))
    assert list(rates["cohort"]) == list(rates["streams"]) == [1, 2, 4]


def test_memory_too_small_for_one_measures_nothing(
    make_config: MakeConfig, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(*arguments: Any) -> float:
        raise MemoryError("no room at all")

    monkeypatch.setattr(sizing, "_seconds", seconds)
    config = make_config()
    rates = sizing.throughputs(config, dataset=make_dataset(config), device=CPU)
    assert rates == {"cohort": {}, "streams": {}}


def test_what_does_not_work_for_several_is_no_harm_to_one(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def step(engine: CohortEngine, index: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(CohortEngine, "_step", step)
    config = make_config({"name": "mlp", "width": 8})
    rates = sizing.throughputs(
        config, dataset=make_dataset(config), device=CPU, sizes=(1, 2), batches=2
    )
    assert {way: set(found) for way, found in rates.items()} == {"cohort": {1}, "streams": {1, 2}}
    assert "2 trials at once (cohort) do not work: no such kernel" in caplog.text


PLAIN: dict[Way, dict[int, float]] = {
    "cohort": {1: 1.0, 4: 1.5, 16: 1.6},
    "streams": {1: 1.0, 4: 2.4},
}


@pytest.mark.parametrize(
    ("compiled", "choice"),
    [
        ({1: 1.8, 4: 2.2, 16: 3.4}, ("cohort", 16, 4)),
        ({1: 1.8, 4: 2.5}, ("streams", 4, 4)),  # no faster by what makes it worth it
        ({1: 9.0, 4: 8.0}, ("alone", 1, 1)),
        ({}, ("streams", 4, 4)),
        (None, ("streams", 4, 4)),
    ],
)
def test_a_compiled_cohort_has_to_beat_every_way_without(
    compiled: dict[int, float] | None, choice: tuple[Way, int, int]
) -> None:
    way, size, beside = choice
    measured = choice_module.Measured(rates=PLAIN, images=100, compiled=compiled)
    assert measured.choice() == Choice(way="streams", size=4, beside=4)
    assert measured.choice_compiled() == Choice(way=way, size=size, beside=beside)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Way]]]:
    """What is measured, by ``train.compile``: 1 image a second alone, and PLAIN's or better."""
    found: list[tuple[str, list[Way]]] = []

    def measured(config: TrialConfig, *, ways: list[Way], **_: Any) -> dict[Way, dict[int, float]]:
        found.append((config.train.compile, ways))
        if config.train.compile == "on":
            return {"cohort": {1: 1.8, 4: 2.2, 16: 3.4}}
        return {way: PLAIN[way] for way in ways}

    monkeypatch.setattr(sizing, "throughputs", measured)
    monkeypatch.setattr(sizing, "lacking", lambda _: None)
    return found


def test_a_long_study_goes_by_compiled_cohorts_and_a_short_one_does_not_ask(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    tmp_path: Path,
    asked: list[tuple[str, list[Way]]],
) -> None:
    """An image a second: 100 images, 3 epochs and a trial are 300 s. From 2,400 s on it is long."""
    config = make_config({"name": "mlp", "width": 8}, epochs=3, compile="auto")
    dataset, file = make_dataset(config, train=100), tmp_path / "cohorts.json"

    def best(repeats: int) -> Choice:
        how = Compiling(measured=tmp_path / "gains", code=tmp_path / "code", together=repeats)
        return sizing.best_way(config, dataset=dataset, device=CPU, file=file, compiling=how)

    short = Choice(way="streams", size=4, beside=4)
    long = Choice(way="cohort", size=16, beside=4)
    assert best(repeats=7) == short
    assert asked == [("off", ["cohort", "streams"])]
    assert best(repeats=8) == long
    assert asked[1:] == [("on", ["cohort"])]
    assert [best(repeats=7), best(repeats=80)] == [short, long]
    assert len(asked) == 2


@pytest.mark.parametrize(
    "error", [UsageError("train.compile: on cannot be done"), RuntimeError("no such kernel")]
)
def test_cohorts_that_cannot_be_compiled_are_tried_once(
    error: Exception,
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    tmp_path: Path,
    asked: list[tuple[str, list[Way]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = sizing.throughputs

    def failing(config: TrialConfig, **further: Any) -> Any:
        found = measure(config, **further)
        if config.train.compile == "on":
            raise error
        return found

    monkeypatch.setattr(sizing, "throughputs", failing)
    config = make_config({"name": "mlp", "width": 8}, epochs=3, compile="auto")
    dataset, file = make_dataset(config, train=100), tmp_path / "cohorts.json"
    how = Compiling(measured=tmp_path / "gains", code=tmp_path / "code", together=100)
    for _ in range(2):
        choice = sizing.best_way(config, dataset=dataset, device=CPU, file=file, compiling=how)
        assert choice == Choice(way="streams", size=4, beside=4)
    assert len(asked) == 2


def test_what_fits_into_no_cohort_is_not_compiled_for_one(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    tmp_path: Path,
    asked: list[tuple[str, list[Way]]],
) -> None:
    config = make_config(optimizer={"name": "rmsprop"}, epochs=3, compile="auto")
    dataset, file = make_dataset(config, train=100), tmp_path / "cohorts.json"
    how = Compiling(measured=tmp_path / "gains", code=tmp_path / "code", together=100)
    sizing.best_way(config, dataset=dataset, device=CPU, file=file, compiling=how)
    assert asked == [("off", ["streams"])]


@pytest.mark.skipif(
    sizing.lacking(CPU) is not None, reason=f"it cannot be compiled here: {sizing.lacking(CPU)}"
)
def test_compiled_cohorts_are_really_measured(
    make_config: MakeConfig,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizing, "SIZES", (1, 2))
    monkeypatch.setattr(choice_module, "TRY_S", {"cpu": 0.0})
    config = make_config({"name": "mlp", "width": 8, "dropout": 0.1}, compile="auto")
    file = tmp_path / "cohorts.json"
    how = Compiling(measured=tmp_path / "gains", code=tmp_path / "code")
    sizing.best_way(config, dataset=make_dataset(config), device=CPU, file=file, compiling=how)
    (kept,) = json.loads(file.read_text()).values()
    assert set(kept["compiled"]) == {"1", "2"}
    assert all(rate > 0 for rate in kept["compiled"].values())

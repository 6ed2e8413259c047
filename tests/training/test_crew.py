"""Trials of different structures side by side against the same trials alone, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trial_bench import (
    CPU,
    MLP,
    MODELS,
    OPTIMIZERS,
    Bench,
    MakeConfig,
    MakeDataset,
    assert_as_alone,
    assert_equal,
    varied,
)

from sweeper.config import TrialConfig
from sweeper.errors import TrialDivergedError, UsageError
from sweeper.measurement import Measurement
from sweeper.training import Interrupted, TrainingClosedError
from sweeper.training.base import Interrupt
from sweeper.training.cohort.engine import CohortEngine
from sweeper.training.cohort.rules import Way
from sweeper.training.crew import Crew, LaneBrokenError
from sweeper.training.engine import Engine
from sweeper.training.lanes import Lane
from sweeper.training.loop import NetworkTraining
from sweeper.training.network import NetworkTrial
from sweeper.training.turns import Steps, settled


class Squad:
    """A crew on the CPU, with what each member measured."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.crew = Crew(CPU)
        self.history: dict[NetworkTrial, list[Measurement]] = {}

    def join(self, config: TrialConfig, way: Way = "streams") -> NetworkTrial:
        member = self.crew.join(config, dataset=self._bench.dataset(config), way=way)
        self.history[member] = []
        return member

    def epoch(self, *, begin: bool = True, interrupt: Interrupt | None = None) -> int:
        """Returns how many lanes' members measured; those that are done leave."""
        measured = self.crew.epoch(begin=begin, interrupt=interrupt)
        for member, measurement in measured:
            self.history[member].append(measurement)
        return len(measured)

    def to_the_end(self) -> None:
        """Train until nobody is left; each is compared with the same trial alone as it ends."""
        while self.crew.members:
            self.epoch()
            for member in self.crew.members:
                if member.finished:
                    assert_as_alone(self._bench, member, self.history[member])
                    member.close()
            self.crew.tidy()


@pytest.fixture
def bench(make_config: MakeConfig, make_dataset: MakeDataset) -> Bench:
    return Bench(make_config, make_dataset)


@pytest.fixture
def squad(bench: Bench) -> Squad:
    return Squad(bench)


@pytest.mark.parametrize(
    ("models", "way"),
    [(list(MODELS), "streams"), (list(MODELS), "cohort"), (["cnn", "vit"], "streams")],
)
def test_different_structures_get_what_they_get_alone(
    models: list[str], way: Way, bench: Bench, squad: Squad
) -> None:
    """33 steps each, in turns, with dropout and augmentation drawn in between."""
    data = {"augment": ["crop", "flip"]}
    for model in models:
        index = 1 + list(MODELS).index(model)
        optimizer = varied(index, OPTIMIZERS[index])
        squad.join(bench.config(index, optimizer, MODELS[model], data), way)
    before = torch.random.get_rng_state()
    squad.epoch()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert squad.crew.running
    squad.to_the_end()
    assert [len(each) for each in squad.history.values()] == [3] * len(models)


def test_batches_and_single_trials_side_by_side(bench: Bench, squad: Squad) -> None:
    """Two of one structure as one batch, two of another, and one of the first by itself."""
    names = ("mlp", "mixer", "mlp", "mixer")
    for index, name in enumerate(names):
        optimizer = varied(index, OPTIMIZERS[index])
        squad.join(bench.config(index, optimizer, MODELS[name]), "cohort")
    single = squad.join(bench.config(4, varied(4, "adamw")), "streams")
    first, second, third, *_ = squad.crew.members
    assert squad.crew.beside(first) == ([third], [second, squad.crew.members[3], single])
    assert squad.crew.beside(single) == ([], squad.crew.members[:4])
    assert [count for _, count in squad.crew.lanes()] == [2, 2, 1]
    squad.to_the_end()


def test_a_neighbour_that_diverges_changes_nothing(bench: Bench, squad: Squad) -> None:
    bad = bench.config(4, {"name": "sgd", "lr": 1e300}, MODELS["cnn"])
    broken = squad.join(bad)
    squad.join(bench.config(1, varied(1, "adamw"), MODELS["mixer"]))
    squad.join(bench.config(2, varied(2, "momentum")), "cohort")
    while not squad.history[broken]:
        squad.epoch()
    assert not squad.history[broken][0].finite
    with pytest.raises(TrialDivergedError, match="finite"):
        broken.test()
    broken.close()
    squad.crew.tidy()
    squad.to_the_end()


def test_nobody_waits_for_a_slower_one(bench: Bench, squad: Squad) -> None:
    """One with batches of 4 has five times as many steps as one with batches of 20."""
    slow = squad.join(bench.config(1, varied(1, "adam"), batch_size=4, epochs=1))
    fast = squad.join(bench.config(2, varied(2, "sgd"), epochs=3))
    while not fast.finished:
        squad.epoch()
    assert not squad.history[slow]
    fast.close()
    late = squad.join(bench.config(3, varied(3, "momentum"), MODELS["vit"], epochs=1))
    squad.epoch()
    assert squad.history[late]
    squad.to_the_end()
    assert len(squad.history[slow]) == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": varied(2, "rmsprop")},
        {"optimizer": varied(2, "adadelta"), "layer_statistics": True},
        {"optimizer": varied(2, "sgd"), "precision": "float16", "epochs": 1, "batch_size": 100},
    ],
    ids=["rmsprop", "layer statistics", "float16"],
)
def test_what_fits_into_no_cohort_trains_beside_others(
    sections: dict[str, Any], bench: Bench, squad: Squad
) -> None:
    one = squad.join(bench.config(2, **sections), "cohort")
    squad.join(bench.config(1, varied(1, "adam")), "cohort")
    squad.to_the_end()
    found = any(name.startswith("layers.") for name in squad.history[one][0].metrics)
    assert found == sections.get("layer_statistics", False)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "rmsprop"])
def test_a_checkpoint_goes_on_alone_and_the_other_way_round(
    optimizer: str, bench: Bench, squad: Squad
) -> None:
    config = bench.config(3, varied(3, optimizer), epochs=4)
    whole = bench.alone(config)
    expected = list(whole.epochs())

    member = squad.join(config)
    squad.join(bench.config(1, varied(1, "adam"), MODELS["vit"], epochs=1, batch_size=4))
    squad.epoch()
    squad.epoch()
    alone = bench.alone(config)
    alone.load_state_dict(member.state_dict())
    assert_equal(alone, squad.history[member] + list(alone.epochs()), whole, expected)

    half = bench.alone(config)
    epochs = half.epochs()
    begun = [next(epochs), next(epochs)]
    resumed = squad.join(config)
    resumed.load_state_dict(half.state_dict())
    while not resumed.finished:
        squad.epoch()
    assert_equal(resumed, begun + squad.history[resumed], whole, expected)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_an_interrupt_puts_all_to_where_their_last_epoch_ended(
    optimizer: str, before: int, bench: Bench, squad: Squad
) -> None:
    members = [
        squad.join(bench.config(1, varied(1, optimizer))),
        squad.join(bench.config(2, varied(2, optimizer), MODELS["mixer"]), "cohort"),
    ]
    while any(len(squad.history[member]) < before for member in members):
        squad.epoch(begin=not squad.crew.running)
    kept = [member.state_dict()["engine"]["model"] for member in members]
    asked = iter([False] * 12 + [True])
    with pytest.raises(Interrupted):
        squad.epoch(interrupt=lambda: next(asked))
    assert not squad.crew.running
    for member, expected in zip(members, kept, strict=True):
        found = member.state_dict()["engine"]["model"]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    squad.to_the_end()


def test_what_breaks_in_one_lane_stays_there(
    bench: Bench, squad: Squad, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the middle of an epoch; the member is where it was, and may go on."""
    guilty = bench.config(1, varied(1, "adam"))
    broken = squad.join(guilty)
    other = squad.join(bench.config(2, varied(2, "sgd"), MODELS["cnn"]))
    original = Engine.training

    def training(engine: Engine, *, epoch: int, lr: float) -> Steps[Any]:
        steps = original(engine, epoch=epoch, lr=lr)
        for count, awaited in enumerate(steps):
            if engine._config is guilty and count == 5:
                raise MemoryError("no room")
            yield awaited
        raise RuntimeError("the other one was to be stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "training", training)
        with pytest.raises(LaneBrokenError) as raised:
            squad.epoch()
    assert raised.value.members == [broken]
    assert isinstance(raised.value.__cause__, MemoryError)
    squad.crew.rewind([other])
    squad.to_the_end()


def test_a_member_whose_best_weights_do_not_fit_is_where_it_was(
    bench: Bench, squad: Squad, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = squad.join(bench.config(1, varied(1, "rmsprop", schedule={"name": "cosine"})))

    def too_much(_: NetworkTraining) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(NetworkTraining, "_weights", too_much)
        with pytest.raises(LaneBrokenError):
            squad.epoch()
    assert not member.testable
    squad.to_the_end()


def test_one_that_cannot_be_built_leaves_the_others_alone(
    bench: Bench, squad: Squad, monkeypatch: pytest.MonkeyPatch
) -> None:
    squad.join(bench.config(1, varied(1, "adam")))
    squad.epoch()

    def none(engine: CohortEngine, config: TrialConfig) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(CohortEngine, "seat", none)
        squad.join(bench.config(2, varied(2, "sgd"), MODELS["vit"]), "cohort")
    with pytest.raises(UsageError, match="support vector machine"):
        squad.join(bench.config(2, varied(2, "sgd")).model_copy(update={"model": svm(bench)}))
    assert len(squad.crew.members) == len(squad.crew._places) == 1
    squad.to_the_end()
    squad.crew.close()


def svm(bench: Bench) -> Any:
    return bench._make_config({"name": "svm"}).model


def test_a_lane_that_waits_for_its_device_is_passed_over(
    bench: Bench, squad: Squad, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where an epoch is over for the host long before it is for the device."""
    waiting: list[Later] = []

    class Later:
        def __init__(self) -> None:
            self.asked = 0
            waiting.append(self)

        def query(self) -> bool:
            self.asked += 1
            return self.asked > 40

        def synchronize(self) -> None:
            raise RuntimeError("nobody may wait while others could train")

    def slowly(device: torch.device) -> Steps[None]:
        done = Later()
        while not done.query():
            yield done

    engine = "sweeper.training.engine.settled"
    squad.join(bench.config(1, varied(1, "adam"), epochs=1))
    with monkeypatch.context() as patch:
        patch.setattr(engine, slowly)
        other = squad.join(bench.config(2, varied(2, "sgd"), MODELS["vit"], epochs=1), "cohort")
        squad.epoch()
        assert squad.history[other]
        while squad.crew.running:
            squad.epoch(begin=False)
    assert len(waiting) == 2
    monkeypatch.setattr(engine, settled)
    for member, history in squad.history.items():
        assert_as_alone(bench, member, history)


def test_several_batches_a_turn_change_nothing(
    bench: Bench, squad: Squad, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr("sweeper.training.lanes._BATCHES_A_TURN", {"cpu": 8})
    squad.join(bench.config(1, varied(1, "adam")))
    squad.join(bench.config(2, varied(2, "sgd"), MODELS["vit"]), "cohort")
    squad.to_the_end()


def test_a_stream_that_has_enough_to_do_is_passed_over() -> None:
    class Never:
        done = False

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            raise RuntimeError("nobody may wait")

    lane = Lane[None](CPU)
    events = [Never() for _ in range(16)]
    lane._queued.extend(events[:15])
    assert lane.ready
    lane._queued.append(events[15])
    assert not lane.ready
    events[0].done = True
    assert lane.ready


def test_closed_members_are_gone(bench: Bench, squad: Squad) -> None:
    one = squad.join(bench.config(1, varied(1, "adam")))
    two = squad.join(bench.config(2, varied(2, "sgd"), MLP), "cohort")
    squad.epoch()
    squad.crew.close()
    assert squad.crew.members == []
    assert squad.epoch() == 0
    for member in (one, two):
        with pytest.raises(TrainingClosedError):
            member.state_dict()

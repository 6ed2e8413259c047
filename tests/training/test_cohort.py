"""Members of a cohort against the same trials alone, in float64, whatever their neighbours do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from trial_bench import (
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

from sweeper.errors import TrialDivergedError, UsageError
from sweeper.measurement import Measurement
from sweeper.models import mixer
from sweeper.training import Interrupted, TrainingClosedError
from sweeper.training.cohort import Member


@pytest.fixture
def bench(make_config: MakeConfig, make_dataset: MakeDataset) -> Bench:
    return Bench(make_config, make_dataset)


@pytest.mark.parametrize("data", [{}, {"augment": ["crop", "flip"], "standardize": "zca"}])
@pytest.mark.parametrize("model", MODELS)
def test_members_get_what_they_get_alone(model: str, data: dict[str, Any], bench: Bench) -> None:
    """All rules in one cohort, 33 steps, no two members with a hyper-parameter in common."""
    configs = [
        bench.config(index, varied(index, name), MODELS[model], data)
        for index, name in enumerate(OPTIMIZERS)
    ]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs]
    rounds = [dict(cohort.epoch()) for _ in range(3)]
    cohort.test(members)
    for member in members:
        assert_as_alone(bench, member, [measured[member] for measured in rounds])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_members_get_what_they_get_where_patches_are_mixed_by_image(
    order: tuple[int, ...], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: without dropout (the first here) by image, alone; never in a cohort, whose masks
    are those of rows. Whoever founds the cohort."""
    monkeypatch.setattr(mixer, "_BY_IMAGE_ON", "cpu")
    configs = [bench.config(index, varied(index, "sgd"), MODELS["mixer"]) for index in order]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs]
    rounds = [dict(cohort.epoch()) for _ in range(3)]
    cohort.test(members)
    for member in members:
        assert_as_alone(bench, member, [measured[member] for measured in rounds])


@pytest.mark.parametrize("model", MODELS)
def test_members_of_a_compiled_cohort_get_what_they_get_alone(model: str, bench: Bench) -> None:
    """With a refill, and with slots that stay empty: what is compiled keeps its size."""
    pytest.importorskip("torch._inductor")
    configs = [
        bench.config(index, varied(index, name), MODELS[model], compile="on")
        for index, name in enumerate(["adamw", "sgd", "nesterov", "adam"])
    ]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs[:3]]
    history: dict[Member, list[Measurement]] = {member: [] for member in members}

    def epoch() -> None:
        for member, measurement in cohort.epoch():
            history[member].append(measurement)

    epoch()
    compiled = cohort._open()._ready.losses
    members[0].close()
    refill = cohort.join(configs[3])
    history[refill] = []
    epoch()
    members[1].close()
    epoch()
    assert cohort._open()._ready.losses is compiled
    assert len(cohort._open().seats) == 3
    for member in (members[2], refill):
        while len(history[member]) < 3:
            epoch()
        train = member.config.train.model_copy(update={"compile": "off"})
        alone = bench.alone(member.config.model_copy(update={"train": train}))
        assert_equal(member, history[member], alone, list(alone.epochs()))


def test_a_compiled_cohort_that_does_not_fit_gives_up_its_slots(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the members go on then, in half of the memory."""
    config = bench.config(0, varied(0, "adamw"), compile="on")
    cohort = bench.cohort(config)
    members = [cohort.join(config) for _ in range(4)]
    cohort.epoch()
    engine = cohort._open()

    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluation", too_much)
        with pytest.raises(torch.OutOfMemoryError):
            cohort.epoch()
    for member in members[2:]:
        member.close()
    assert len(cohort.epoch()) == 2
    assert len(engine.seats) == 2
    assert engine.is_compiled


def test_members_are_where_they_were_after_an_epoch_whose_best_weights_do_not_fit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [
        bench.config(index, varied(index, name, schedule={"name": "cosine"}))
        for index, name in enumerate(["adam", "sgd", "momentum"])
    ]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs]
    original = Member._weights

    def too_much(member: Member) -> Mapping[str, torch.Tensor]:
        if member is members[1]:
            raise torch.OutOfMemoryError("no room")
        return original(member)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "_weights", too_much)
        with pytest.raises(torch.OutOfMemoryError):
            cohort.epoch()
    assert not any(member.testable for member in members)
    rounds = [dict(cohort.epoch()) for _ in range(3)]
    for member in members:
        assert_as_alone(bench, member, [measured[member] for measured in rounds])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_members_of_one_rule_get_what_they_get_alone(optimizer: str, bench: Bench) -> None:
    configs = [bench.config(index, varied(index, optimizer), epochs=2) for index in (1, 3)]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs]
    rounds = [dict(cohort.epoch()) for _ in range(2)]
    for member in members:
        assert_as_alone(bench, member, [measured[member] for measured in rounds])


@pytest.mark.parametrize("model", MODELS)
def test_a_neighbour_that_diverges_changes_nothing(model: str, bench: Bench) -> None:
    good = bench.config(1, varied(1, "adamw"), MODELS[model])
    other = bench.config(2, varied(2, "momentum"), MODELS[model])
    bad = bench.config(4, {"name": "sgd", "lr": 1e300, "clip_norm": 1.0}, MODELS[model])
    cohort = bench.cohort(good)
    first, broken, last = (cohort.join(config) for config in (good, bad, other))
    rounds = [dict(cohort.epoch()) for _ in range(3)]
    assert not rounds[0][broken].finite
    assert not broken.testable
    with pytest.raises(TrialDivergedError, match="finite"):
        broken.test()
    for member in (first, last):
        assert_as_alone(bench, member, [measured[member] for measured in rounds])


@pytest.mark.parametrize("model", MODELS)
def test_refill_growth_and_compaction_change_nothing(model: str, bench: Bench) -> None:
    """One leaves and another takes its slot, one leaves for good, one comes on top."""
    configs = [
        bench.config(index, varied(index, name), MODELS[model])
        for index, name in enumerate(OPTIMIZERS)
    ]
    cohort = bench.cohort(configs[0])
    leaving, pruned, staying = (cohort.join(config) for config in configs[:3])
    history: dict[Member, list[Measurement]] = {}

    def epoch() -> None:
        for member, measured in cohort.epoch():
            history.setdefault(member, []).append(measured)

    epoch()
    leaving.close()
    refill = cohort.join(configs[3])  # into the slot that is free
    epoch()
    pruned.close()  # and nobody follows: the cohort shrinks
    epoch()
    assert [len(history[each]) for each in (leaving, pruned, staying, refill)] == [1, 2, 3, 2]
    assert_as_alone(bench, staying, history[staying])
    staying.close()
    late = cohort.join(configs[4])
    further = cohort.join(bench.config(6, varied(6, "adam"), MODELS[model]))  # one more than slots
    epoch()
    assert_as_alone(bench, refill, history[refill])
    refill.close()
    epoch()
    epoch()
    for member in (late, further):
        assert_as_alone(bench, member, history[member])
    with pytest.raises(TrainingClosedError):
        leaving.state_dict()
    for member in (late, further):
        member.close()
    assert cohort.members == []
    assert cohort.epoch() == []


def test_a_slot_that_stays_empty_changes_nothing(bench: Bench) -> None:
    """As with a captured step, which is not captured anew for one member less."""
    configs = [bench.config(index, varied(index, name)) for index, name in enumerate(OPTIMIZERS)]
    cohort = bench.cohort(configs[0])
    members = [cohort.join(config) for config in configs]
    rounds = [dict(cohort.epoch())]
    engine = cohort._open()
    engine._ready.captured = "captured"
    members.pop(1).close()
    rounds += [dict(cohort.epoch()) for _ in range(2)]
    assert len(engine.seats) == 5
    for member in members:
        assert_as_alone(bench, member, [measured[member] for measured in rounds])
    members[0].close()
    cohort.epoch()
    assert len(engine.seats) == 3


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_goes_on_alone_and_the_other_way_round(
    optimizer: str, model: str, bench: Bench
) -> None:
    """However weights and what the optimizer keeps of them lie in memory here and there."""
    schedule = {"name": "plateau", "patience": 0, "factor": 0.5, "monitor": "val_accuracy"}
    config = bench.config(3, varied(3, optimizer, schedule=schedule), MODELS[model], epochs=4)
    neighbour = bench.config(1, varied(1, "adam"), MODELS[model], epochs=4)
    whole = bench.alone(config)
    expected = list(whole.epochs())

    cohort = bench.cohort(config)
    member = cohort.join(config)
    cohort.join(neighbour)
    begun = [dict(cohort.epoch())[member] for _ in range(2)]
    alone = bench.alone(config)
    alone.load_state_dict(member.state_dict())
    assert_equal(alone, begun + list(alone.epochs()), whole, expected)

    half = bench.alone(config)
    epochs = half.epochs()
    begun = [next(epochs), next(epochs)]
    cohort = bench.cohort(config)
    cohort.join(neighbour)
    cohort.epoch()
    resumed = cohort.join(config)
    resumed.load_state_dict(half.state_dict())
    history = begun + [dict(cohort.epoch())[resumed] for _ in range(2)]
    assert_equal(resumed, history, whole, expected)


def test_members_may_differ_in_epochs_schedule_and_initialisation(bench: Bench) -> None:
    configs = [
        bench.config(0, varied(0, "adam", schedule="cosine"), {**MLP, "init": "orthogonal"}),
        bench.config(1, varied(1, "sgd", schedule={"name": "exponential", "gamma": 0.5}), epochs=2),
    ]
    cohort = bench.cohort(configs[0])
    long, short = (cohort.join(config) for config in configs)
    rounds = [dict(cohort.epoch()) for _ in range(2)]
    assert_as_alone(bench, short, [measured[short] for measured in rounds])
    short.close()
    rounds.append(dict(cohort.epoch()))
    assert_as_alone(bench, long, [measured[long] for measured in rounds])


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_precisions_and_losses_begin_as_alone(
    precision: str, loss: str, bench: Bench
) -> None:
    """One epoch of few steps: later ones drift apart by rounding."""
    config = bench.config(
        2, {"name": "sgd", "lr": 1e-3}, epochs=1, batch_size=100, precision=precision, loss=loss
    )
    cohort = bench.cohort(config)
    member = cohort.join(config)
    cohort.join(bench.config(3, {"name": "adam"}, batch_size=100, precision=precision, loss=loss))
    measured = dict(cohort.epoch())[member]
    (expected,) = bench.alone(config).epochs()
    tolerance = 1e-5 if precision == "float32" else 1e-2
    for metric in ("train_loss", "val_loss"):
        assert measured.metrics[metric] == pytest.approx(expected.metrics[metric], rel=tolerance)


def test_an_interrupt_ends_the_epoch_for_all(bench: Bench) -> None:
    config = bench.config(1, varied(1, "sgd"))
    cohort = bench.cohort(config)
    cohort.join(config)
    asked = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        cohort.epoch(interrupt=lambda: next(asked))


def test_another_structure_cannot_join(bench: Bench) -> None:
    cohort = bench.cohort(bench.config(1, varied(1, "sgd")))
    with pytest.raises(UsageError, match="same structure"):
        cohort.join(bench.config(1, varied(1, "sgd"), batch_size=21))
    with pytest.raises(UsageError, match="alone: optimizer rmsprop is none of"):
        bench.cohort(bench.config(1, varied(1, "rmsprop")))
    cohort.close()
    with pytest.raises(TrainingClosedError):
        cohort.epoch()

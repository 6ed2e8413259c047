"""A trial that is tried again is the same trial to pruner and sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna
import pytest

from sweeper.store import Outcome, Store, StoredStudy, held, open_store, queue, recovery, studies

Start = Callable[..., StoredStudy]
CURVE = (0.80, 0.85, 0.90, 0.92, 0.93, 0.95, 0.96, 0.97)


def claimed(store: Store, study: StoredStudy, worker: str = "a") -> queue.Claim:
    found = queue.claim(store, study.id, worker)
    assert found is not None
    held.values_of(study.spec, study.study, found)
    return found


def lose(store: Store, study: StoredStudy, worker: str = "a") -> None:
    recovery.lose_trials_of(store, study.id, worker)
    with store.exclusively():
        recovery.reconcile(store, study.id, study.spec)


def pruned_after(
    store: Store, study: StoredStudy, trial: queue.Claim, curve: Sequence[float], resumed: int = 0
) -> int | None:
    """The epoch after which the trial is pruned; it goes on after ``resumed`` epochs."""
    told = dict(enumerate(curve[:resumed], 1))
    held.report_missing(store, trial, told)
    for epoch, value in enumerate(curve[resumed:], resumed + 1):
        held.report(store, trial, epoch, value)
        told[epoch] = value
        if held.should_prune(store, study.study, trial, epoch, told):
            return epoch
    return None


@pytest.mark.parametrize("resumed", [0, 3, 6])
def test_no_trial_competes_with_the_one_that_it_replaced(
    store: Store, started: Start, resumed: int
) -> None:
    study = started(
        search={"trials": 2, "sampler": "random", "pruner": {"name": "asha", "reduction": 2}}
    )
    assert pruned_after(store, study, claimed(store, study), CURVE) is None
    lose(store, study)
    other = claimed(store, study, "b")
    successor = claimed(store, study)
    assert successor.origin == 0
    assert pruned_after(store, study, successor, CURVE, resumed) is None
    # the best first epoch of all, which is what the first rung compares
    assert pruned_after(store, study, other, [0.81]) is None
    assert pruned_after(store, study, other, [0.81, 0.82]) == 2


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_to_be_pruned_is_pruned_though_its_worker_died_before_it_said_so(
    store: Store, started: Start, lost: bool
) -> None:
    study = started(
        search={"trials": 2, "sampler": "random", "pruner": {"name": "asha", "reduction": 2}}
    )
    assert pruned_after(store, study, claimed(store, study), CURVE) is None
    bad = claimed(store, study, "b")
    assert pruned_after(store, study, bad, [0.1] * 8) == 1
    if lost:
        lose(store, study, "b")
    else:
        held.put_back(store, bad)
    again = claimed(store, study, "c")
    assert again.origin == bad.number
    assert pruned_after(store, study, again, [0.1] * 8, resumed=1) == 2


def test_a_successor_stays_in_the_bracket_of_the_first_attempt(
    store: Store, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = started(
        search={"trials": 3, "sampler": "random", "pruner": {"name": "hyperband", "reduction": 2}},
        train={"epochs": 8},
    )
    claimed(store, study)
    lose(store, study)
    for worker in ("b", "c"):
        claimed(store, study, worker)
    successor = claimed(store, study)
    seen = []
    bracket = optuna.pruners.HyperbandPruner._get_bracket_id

    def noted(pruner: Any, of: Any, trial: Any) -> int:
        seen.append(trial.number)
        return bracket(pruner, of, trial)

    monkeypatch.setattr(optuna.pruners.HyperbandPruner, "_get_bracket_id", noted)
    pruned_after(store, study, successor, CURVE)
    assert set(seen) == {0, 1, 2}


@pytest.mark.parametrize(
    ("sampler", "fact"),
    [
        ({"name": "nsga2", "population": 2}, "NSGAIISampler:generation"),
        ({"name": "cmaes", "startup_trials": 1}, "cma:generation"),
    ],
)
def test_a_successor_belongs_to_the_generation_that_drew_it(
    store: Store, started: Start, sampler: dict[str, Any], fact: str
) -> None:
    parameters = {
        "optimizer.lr": {"low": 1.0e-4, "high": 0.1, "log": True},
        "optimizer.weight_decay": {"low": 0.0, "high": 0.1},
    }
    study = started(search={"trials": 8, "sampler": sampler}, parameters=parameters)
    for _ in range(6):  # four make a generation of cmaes here, two one of nsga2
        trial = claimed(store, study)
        held.finish(store, study.study, trial, outcome=Outcome.COMPLETED, values=[0.5])
    drawn = store.storage.get_trial(claimed(store, study).trial_id).system_attrs
    assert fact in drawn
    lose(store, study)
    last = store.storage.get_all_trials(study.id, deepcopy=False)[-1].system_attrs
    assert last == {key: drawn[key] for key in drawn if not key.startswith("cma:optimizer")}


def test_a_trial_that_is_younger_than_what_the_pruner_read_is_no_fault(
    store: Store, url: str, started: Start
) -> None:
    pruner = {"name": "median", "startup_trials": 1}
    study = started(search={"trials": 2, "sampler": "random", "pruner": pruner})
    first = claimed(store, study)
    claimed(store, study, "b")
    assert pruned_after(store, study, first, [0.5]) is None  # reads all trials
    held.finish(store, study.study, first, outcome=Outcome.COMPLETED, values=[0.5])
    elsewhere = open_store(url)
    lose(elsewhere, studies.load(elsewhere, "study"), "b")
    elsewhere.close()
    assert pruned_after(store, study, claimed(store, study), [0.6]) is None

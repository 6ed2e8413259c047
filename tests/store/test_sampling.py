"""Samplers and pruners as a study file names them."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from typing import Any

import cmaes
import numpy as np
import optuna
import pytest

from sweeper.grid import grid
from sweeper.store import sampling
from sweeper.store.samplers import CmaEsSampler
from sweeper.study.spec import StudySpec

Make = Callable[..., StudySpec]
SPACE = {
    "optimizer.name": {"values": ["sgd", "adam"]},
    "optimizer.momentum": {"low": 0.1, "high": 0.9, "when": {"optimizer.name": "adam"}},
    "optimizer.lr": {"low": 1.0e-4, "high": 0.1, "log": True},
    "train.batch_size": {"low": 32, "high": 128, "step": 32},
    "data.augment": {"values": [[], ["flip"]]},
}
SAMPLERS = ["tpe", "random", "grid", "qmc", "gp", "cmaes", "nsga2"]


def run(spec: StudySpec, trials: int) -> optuna.Study:
    study = optuna.create_study(direction="maximize", pruner=sampling.pruner(spec))
    for number in range(trials):
        study.sampler = sampling.sampler(spec, number)
        trial = study.ask()
        values = sampling.draw(spec, trial)
        study.tell(trial, -((math.log10(values["optimizer.lr"]) + 2) ** 2))
    return study


@pytest.mark.parametrize("name", ["random", "tpe", "grid"])
@pytest.mark.parametrize(
    ("low", "high", "step", "wanted"),
    [(0.0, 0.5, 0.1, 0.3), (0.05, 0.95, 0.05, 0.15), (0.0, 0.9, 0.3, 0.9), (0.1, 0.9, 0.2, 0.7)],
)
def test_a_condition_holds_for_a_point_that_steps_lead_to(
    spec: Make, name: str, low: float, high: float, step: float, wanted: float
) -> None:
    search = {"sampler": name} if name == "grid" else {"sampler": name, "trials": 60}
    parameters = {
        "model.dropout": {"low": low, "high": high, "step": step},
        "optimizer.weight_decay": {"values": [0.01, 0.1], "when": {"model.dropout": wanted}},
    }
    found = spec(search=search, parameters=parameters)
    points = list(grid(found.parameters)) if name == "grid" else sampling.preview(found, 60)
    there = [point for point in points if point["model.dropout"] == wanted]
    assert there
    assert there == [point for point in points if "optimizer.weight_decay" in point]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_points_of_the_space(spec: Make, name: str) -> None:
    found = spec(search={"sampler": name, "trials": 14, "seed": 3}, parameters=SPACE)
    study = run(found, 14)
    for trial in study.trials:
        values = sampling.decoded(found, trial.params)
        found.trial_config(values)
        assert ("optimizer.momentum" in values) is (values["optimizer.name"] == "adam")
        assert values["data.augment"] in ([], ["flip"])
        assert values["train.batch_size"] in (32, 64, 96, 128)


@pytest.mark.parametrize("name", ["tpe", "random", "qmc", "gp", "cmaes", "nsga2"])
def test_a_seed_decides_the_points(spec: Make, name: str) -> None:
    def points(seed: int) -> list[dict[str, object]]:
        found = spec(search={"sampler": name, "trials": 12, "seed": seed}, parameters=SPACE)
        return [trial.params for trial in run(found, 12).trials]

    assert points(1) == points(1)
    assert points(1) != points(2)


def test_trials_with_one_seed_draw_different_points(spec: Make) -> None:
    found = spec(search={"sampler": "random", "trials": 20}, parameters=SPACE)
    rates = [trial.params["optimizer.lr"] for trial in run(found, 20).trials]
    assert len(set(rates)) == 20


def test_tpe_finds_the_better_region(spec: Make) -> None:
    found = spec(search={"sampler": "tpe", "trials": 40, "seed": 0}, parameters=SPACE)
    study = run(found, 40)
    early = [abs(math.log10(trial.params["optimizer.lr"]) + 2) for trial in study.trials[:10]]
    late = [abs(math.log10(trial.params["optimizer.lr"]) + 2) for trial in study.trials[-10:]]
    assert sum(late) < 0.75 * sum(early)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("tpe", "startup_trials"),
        ("gp", "startup_trials"),
        ("cmaes", "startup_trials"),
        ("nsga2", "population"),
    ],
)
def test_so_many_trials_are_drawn_at_random_first(spec: Make, name: str, option: str) -> None:
    def points(sampler: object) -> list[dict[str, object]]:
        found = spec(search={"sampler": sampler, "trials": 6, "seed": 1}, parameters=SPACE)
        return [trial.params for trial in run(found, 6).trials]

    drawn, random = points({"name": name, option: 3}), points("random")
    assert drawn[:3] == random[:3]
    assert drawn[3:] != random[3:]


def test_tpe_keeps_away_from_what_is_running(spec: Make) -> None:
    found = spec(search={"sampler": {"name": "tpe", "startup_trials": 8}, "trials": 28})

    def distance(running: int) -> float:
        """From the best point so far to the next ones, while others train at that very point."""
        study = run(found, 12)
        best = study.best_trial
        twin = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=best.params,
            distributions=best.distributions,
        )
        study.add_trials([twin] * running)
        total = 0.0
        for number in range(12, 20):
            study.sampler = sampling.sampler(found, number)
            trial = study.ask()
            rate = sampling.draw(found, trial)["optimizer.lr"]
            total += abs(math.log10(rate / best.params["optimizer.lr"]))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return total

    assert distance(running=8) > 1.5 * distance(running=0)


def test_qmc_spreads_evenly(spec: Make) -> None:
    """One of 16 points in each sixteenth."""
    study = run(spec(search={"sampler": "qmc", "trials": 16}), 16)
    rates = [trial.params["optimizer.lr"] for trial in study.trials]
    assert sorted(int((math.log10(rate) + 4) / 3 * 16) for rate in rates) == list(range(16))


def test_trials_that_are_drawn_at_once_are_other_points_of_the_sequence(spec: Make) -> None:
    found = spec(search={"sampler": "qmc", "trials": 16})
    study = optuna.create_study()
    trials, rates = [], []
    for number in range(16):
        study.sampler = sampling.sampler(found, number)
        trials.append(study.ask())
    for trial in reversed(trials):  # nobody knows yet what the others drew
        study.sampler = sampling.sampler(found, trial.number)
        rates.append(sampling.draw(found, trial)["optimizer.lr"])
    assert rates[::-1] == [point["optimizer.lr"] for point in sampling.preview(found, 16)]
    assert len(set(rates)) == 16


def prunes(spec: StudySpec, curves: list[list[float]]) -> list[int | None]:
    """The epoch after which each curve is pruned, or None."""
    study = optuna.create_study(
        direction="maximize", pruner=sampling.pruner(spec), study_name="brackets"
    )
    ends: list[int | None] = []
    for curve in curves:
        trial = study.ask()
        end = None
        for epoch, value in enumerate(curve, 1):
            trial.report(value, epoch)
            if epoch < len(curve) and trial.should_prune():
                end = epoch
                break
        study.tell(trial, state=optuna.trial.TrialState.PRUNED) if end else study.tell(
            trial, curve[-1]
        )
        ends.append(end)
    return ends


GOOD = [[0.5 + 0.01 * epoch for epoch in range(27)]] * 9
BAD = [[0.2 - 0.001 * epoch for epoch in range(27)]]


@pytest.mark.parametrize(
    "pruner",
    [
        {"name": "median", "min_epochs": 3},
        {"name": "asha", "min_epochs": 3},
        {"name": "hyperband", "min_epochs": 3},
        {"name": "patient", "patience": 4},
        {"name": "threshold", "lower": 0.3, "min_epochs": 3},
    ],
)
def test_every_pruner_ends_the_bad_trial_and_keeps_good_ones(
    spec: Make, pruner: dict[str, object]
) -> None:
    found = spec(search={"trials": 10, "pruner": pruner}, train={"epochs": 27})
    ends = prunes(found, GOOD + BAD * 4)
    pruned = [end for end in ends[9:] if end]
    assert pruned  # hyperband lets some brackets run to their end
    assert min(pruned) >= 3
    if pruner["name"] in {"median", "patient", "threshold"}:
        assert len(pruned) == 4
        assert ends[:9] == [None] * 9


@pytest.mark.parametrize(("epochs", "rungs"), [(5, {3}), (27, {3, 9, None})])
def test_brackets_reach_to_the_full_number_of_epochs(
    spec: Make, epochs: int, rungs: set[int | None]
) -> None:
    """Trials each worse than all before end at the first rung of their brackets."""
    found = spec(
        search={"trials": 40, "pruner": {"name": "hyperband", "min_epochs": 3}},
        train={"epochs": epochs},
    )
    ends = prunes(found, [[-float(number)] * epochs for number in range(40)])
    assert ends[0] is None
    assert set(ends[1:]) == rungs


def test_no_pruner_never_prunes(spec: Make) -> None:
    assert prunes(spec(), GOOD + BAD) == [None] * 10


def test_preview_is_what_the_first_trials_draw(spec: Make) -> None:
    found = spec(search={"trials": 5, "seed": 4}, parameters=SPACE)
    drawn = [sampling.decoded(found, trial.params) for trial in run(found, 5).trials]
    assert sampling.preview(found, 5) == drawn


class Hostile:
    """Runs something as it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 7",)


@pytest.mark.parametrize("protocol", range(4, pickle.HIGHEST_PROTOCOL + 1))
def test_the_state_of_cmaes_is_read_whoever_has_pickled_it(protocol: int) -> None:
    optimizer = cmaes.CMA(mean=np.zeros(2), sigma=1.0, bounds=np.array([[0.0, 1.0]] * 2))
    asked = [(optimizer.ask(), float(value)) for value in range(optimizer.population_size)]
    optimizer.tell(asked)
    state = pickle.dumps(optimizer, protocol=protocol).hex()
    trial = optuna.trial.create_trial(value=0.5, system_attrs={"cma:optimizer:0": state})
    read = CmaEsSampler(n_startup_trials=1)._restore_optimizer([trial])
    assert (read.generation, read.dim) == (1, 2)


def test_the_state_of_cmaes_is_kept_and_runs_nothing(spec: Make) -> None:
    found = spec(
        search={"sampler": {"name": "cmaes", "startup_trials": 1}, "trials": 20},
        parameters={path: SPACE[path] for path in ("optimizer.lr", "train.batch_size")},
    )
    study = run(found, 20)
    generations = [trial.system_attrs.get("cma:generation", 0) for trial in study.trials]
    assert generations[-1] >= 2  # its own state was read again and again
    last = study.trials[-1]
    state = {"cma:optimizer:0": pickle.dumps(Hostile()).hex(), "cma:generation": 1}
    study.add_trial(
        optuna.trial.create_trial(
            value=0.5, params=last.params, distributions=last.distributions, system_attrs=state
        )
    )
    with pytest.raises(pickle.UnpicklingError, match=r"it names .*system; somebody has changed it"):
        sampling.draw(found, study.ask())

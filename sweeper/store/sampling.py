"""From a study's ``search`` and ``parameters`` to Optuna: samplers, pruners, one drawn point."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from sweeper.space import Range, Values, encode, nearest, ordered, position
from sweeper.store.samplers import CmaEsSampler, QmcSampler
from sweeper.study import spec as files
from sweeper.study.plan import most_epochs
from sweeper.study.spec import StudySpec


def trial_seed(seed: int, trial_number: int) -> int:
    """The sampler's seed for one trial: workers that share a seed must not share draws."""
    digest = hashlib.sha256(f"{seed}/{trial_number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def sampler(spec: StudySpec, trial_number: int) -> optuna.samplers.BaseSampler:
    """The study's sampler, seeded for one trial.

    Quasi-Monte Carlo is one sequence, in which a trial has its place: it keeps the study's seed.
    Parameters with a condition are no part of it, and drawn at random.
    """
    seed = trial_seed(spec.search.seed, trial_number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match spec.search.sampler:
            case files.Tpe(startup_trials=startup):
                return optuna.samplers.TPESampler(
                    seed=seed,
                    n_startup_trials=startup,
                    multivariate=True,
                    group=_varying(spec),
                    constant_liar=True,
                )
            case files.Gp(startup_trials=startup):
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
            case files.CmaEs(startup_trials=startup):
                return CmaEsSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            case files.Nsga2(population=population):
                return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
            case files.Qmc():
                always = {
                    path: distribution(parameter)
                    for path, parameter in spec.parameters.items()
                    if not parameter.when
                }
                return QmcSampler(
                    trial_number,
                    always,
                    seed=spec.search.seed,
                    scramble=True,
                    independent_sampler=optuna.samplers.RandomSampler(seed=seed),
                    warn_independent_sampling=False,
                )
            case files.Random() | files.Grid() | files.ReferenceOnly():
                return optuna.samplers.RandomSampler(seed=seed)


def _varying(spec: StudySpec) -> bool:
    """Whether trials differ in which parameters they have, so that TPE must model groups."""
    return any(parameter.when for parameter in spec.parameters.values()) or bool(
        spec.reference and spec.reference.trials
    )


def pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """The study's pruner. Steps are epochs completed, counted from 1."""
    direction = spec.objective[0].direction
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match spec.search.pruner:
            case files.NoPruner():
                return optuna.pruners.NopPruner()
            case files.MedianPruner(min_epochs=least, startup_trials=startup):
                return optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=least)
            case files.AshaPruner(min_epochs=least, reduction=reduction):
                return optuna.pruners.SuccessiveHalvingPruner(
                    min_resource=least, reduction_factor=reduction
                )
            case files.HyperbandPruner(min_epochs=least, reduction=reduction):
                return optuna.pruners.HyperbandPruner(
                    min_resource=least,
                    max_resource=max(least, most_epochs(spec)),
                    reduction_factor=reduction,
                )
            case files.PatientPruner(patience=patience, min_delta=delta):
                return optuna.pruners.PatientPruner(None, patience=patience, min_delta=delta)
            case files.ThresholdPruner(min_epochs=least, lower=lower, upper=upper):
                if lower is None and upper is None:
                    lower, upper = (0.0, None) if direction == "maximize" else (None, 1e9)
                return optuna.pruners.ThresholdPruner(
                    lower=lower, upper=upper, n_warmup_steps=least
                )


def distribution(parameter: Values | Range) -> BaseDistribution:
    """Optuna's distribution for a parameter; values that are no scalars stand as JSON."""
    if isinstance(parameter, Values):
        return CategoricalDistribution([encode(value) for value in parameter.values])
    if parameter.integer:
        return IntDistribution(
            int(parameter.low),
            int(parameter.high),
            log=parameter.log,
            step=int(parameter.step or 1),
        )
    return FloatDistribution(
        float(parameter.low),
        float(parameter.high),
        log=parameter.log,
        step=None if parameter.step is None else float(parameter.step),
    )


def decode(parameter: Values | Range, value: Any) -> Any:
    """The value of the study file that an Optuna parameter stands for."""
    if isinstance(parameter, Range):
        return nearest(parameter, value)
    for option in parameter.values:
        if encode(option) == value and isinstance(value, bool) is isinstance(option, bool):
            return option
    return value


def decoded(spec: StudySpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's Optuna parameters as values of the study file."""
    return {
        path: decode(spec.parameters[path], value) if path in spec.parameters else value
        for path, value in params.items()
    }


def encoded(spec: StudySpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the study file as Optuna's parameters."""
    result = {}
    for path, value in values.items():
        parameter = spec.parameters[path]
        if isinstance(parameter, Values):
            index = position(parameter, value)
            result[path] = encode(value if index is None else parameter.values[index])
        else:
            result[path] = int(value) if parameter.integer else float(value)
    return result


def draw(spec: StudySpec, trial: optuna.Trial) -> dict[str, Any]:
    """Let the sampler choose every parameter whose condition holds, parents first."""
    values: dict[str, Any] = {}
    for path in ordered(spec.parameters):
        parameter = spec.parameters[path]
        if not parameter.holds(values):
            continue
        values[path] = decode(parameter, _suggest(trial, path, distribution(parameter)))
    return values


def _suggest(trial: optuna.Trial, path: str, options: BaseDistribution) -> Any:
    if isinstance(options, CategoricalDistribution):
        return trial.suggest_categorical(path, options.choices)
    if isinstance(options, IntDistribution):
        return trial.suggest_int(
            path, options.low, options.high, step=options.step, log=options.log
        )
    if isinstance(options, FloatDistribution):
        return trial.suggest_float(
            path, options.low, options.high, step=options.step, log=options.log
        )
    raise TypeError(f"no way to suggest {type(options).__name__}")


def preview(spec: StudySpec, count: int) -> list[dict[str, Any]]:
    """The first ``count`` points that the sampler would draw in an empty study.

    They are what trials 0, 1, … get, as long as the sampler has no results to learn from.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=[objective.direction for objective in spec.objective], pruner=pruner(spec)
    )
    points = []
    for number in range(count):
        study.sampler = sampler(spec, number)
        points.append(draw(spec, study.ask()))
    return points

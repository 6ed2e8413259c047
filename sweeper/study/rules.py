"""Checks across sections: budget and sampler, pruner, objectives, faults, data, reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sweeper.config.data import ImageFolder
from sweeper.grid import grid_size
from sweeper.space import Range, Values, circle
from sweeper.study.cluster import LEAD_S, lead_s
from sweeper.study.draft import Draft
from sweeper.study.folder import folder_mistake
from sweeper.study.messages import Finding, Path
from sweeper.study.parameters import path_mistake, refusals
from sweeper.study.spec import CmaEs, Grid, NoPruner, ReferenceOnly, ThresholdPruner

MAX_GRID: Final = 100_000
"""The most points a grid may have."""
BEATS_BEFORE_LOST: Final = 3


def rule_mistakes(draft: Draft) -> Iterator[Finding]:
    """Every mistake that lies in no value by itself, but in how sections go together."""
    yield from _budget_mistakes(draft)
    yield from _several_objectives(draft)
    yield from _stop_mistakes(draft)
    yield from _pruner_mistakes(draft)
    yield from _fault_mistakes(draft)
    yield from _slurm_mistakes(draft)
    yield from _folder_mistakes(draft)
    yield from _reference_mistakes(draft)


def _budget_mistakes(draft: Draft) -> Iterator[Finding]:
    search = draft.spec.search
    if not draft.sound("search", "sampler") or not draft.sound("search", "trials"):
        return
    match search.sampler:
        case Grid():
            yield from _grid_mistakes(draft)
        case ReferenceOnly():
            yield from _reference_only_mistakes(draft)
        case _ if search.trials is None:
            yield Finding(
                path=("search", "trials"),
                message=f"is missing; sampler {search.sampler.name} needs the number of trials",
                at="section",
            )
        case _ if search.trials > 1 and _single_point(draft):
            yield Finding(
                path=("search", "trials"),
                message=f"a study whose parameters leave one configuration must have trials: 1, "
                f"but got {search.trials}; add parameters, or vary train.seed: "
                f"{{low: 0, high: {search.trials - 1}}} with sampler grid",
            )


def _single_point(draft: Draft) -> bool:
    parameters = draft.spec.parameters
    return draft.sound("parameters") and all(
        len(p.values) == 1 if isinstance(p, Values) else p.low == p.high
        for p in parameters.values()
    )


def _grid_mistakes(draft: Draft) -> Iterator[Finding]:
    parameters, trials = draft.spec.parameters, draft.spec.search.trials
    continuous = [
        path for path, p in parameters.items() if isinstance(p, Range) and p.points is None
    ]
    for path in continuous:
        yield Finding(
            path=("parameters", path),
            message="a grid must have a list of values or a range with a step, but this range is "
            "continuous; give it a step, or list the values",
        )
    if continuous or not draft.sound("parameters") or circle(parameters):
        return
    size = grid_size(parameters, MAX_GRID + 1)
    if size > MAX_GRID:
        yield Finding(
            path=("parameters",),
            message=f"a grid must have at most {MAX_GRID:,} points, but this one has more; list "
            f"fewer values, or let a sampler draw",
            at="key",
        )
    elif trials is not None and trials != size:
        yield Finding(
            path=("search", "trials"),
            message=f"a grid runs each of its {size:,} points once, but got trials: {trials}; "
            f"leave trials out, or let a sampler such as random draw {trials} of them",
        )


def _reference_only_mistakes(draft: Draft) -> Iterator[Finding]:
    reference, trials = draft.spec.reference, draft.spec.search.trials
    if not draft.sound("reference"):
        return
    count = len(reference.trials) if reference else 0
    if not count:
        yield Finding(
            path=("search", "sampler"),
            message="sampler reference must have trials to run under reference, but there are none",
        )
    elif trials is not None and trials != count:
        yield Finding(
            path=("search", "trials"),
            message=f"sampler reference runs the {count} trials of the reference, but got "
            f"trials: {trials}; leave trials out",
        )


def _several_objectives(draft: Draft) -> Iterator[Finding]:
    if not draft.sound("objective"):
        return
    spec = draft.spec
    metrics = [objective.metric for objective in spec.objective]
    for index, metric in enumerate(metrics):
        if metric in metrics[:index]:
            yield Finding(
                path=("objective", index, "metric"),
                message=f"each objective must be another metric, but {metric} is there twice",
            )
    if len(metrics) < 2:
        return
    if not isinstance(spec.search.pruner, NoPruner):
        yield Finding(
            path=("search", "pruner"),
            message=f"a pruner must have one objective to compare trials by, but there are "
            f"{len(metrics)}; use pruner none, or one objective",
        )
    if isinstance(spec.search.sampler, CmaEs):
        yield Finding(
            path=("search", "sampler"),
            message=f"sampler cmaes must have one objective, but there are {len(metrics)}; use "
            f"tpe, gp or nsga2",
        )


def _stop_mistakes(draft: Draft) -> Iterator[Finding]:
    if not draft.sound("objective") or not draft.sound("search", "stop"):
        return
    objectives, stop = draft.spec.objective, draft.spec.search.stop
    for name in ("target", "patience"):
        if len(objectives) > 1 and getattr(stop, name) is not None:
            yield Finding(
                path=("search", "stop", name),
                message=f"{name} must have one objective to go by, but there are "
                f"{len(objectives)}; leave it out, or use one objective",
            )


def _pruner_mistakes(draft: Draft) -> Iterator[Finding]:
    pruner = draft.spec.search.pruner
    if not draft.sound("search", "pruner"):
        return
    if isinstance(pruner, ThresholdPruner):
        if pruner.lower is None and pruner.upper is None:
            yield Finding(
                path=("search", "pruner"),
                message="pruner threshold must have lower or upper, but has neither",
            )
        elif pruner.lower is not None and pruner.upper is not None and pruner.lower > pruner.upper:
            yield Finding(
                path=("search", "pruner", "lower"),
                message=f"lower <= upper must hold, but got lower={pruner.lower}, "
                f"upper={pruner.upper}; swap them",
            )


def _fault_mistakes(draft: Draft) -> Iterator[Finding]:
    faults = draft.spec.faults
    least = BEATS_BEFORE_LOST * faults.heartbeat_s
    if draft.sound("faults") and faults.lost_after_s < least:
        written = draft.root.find(("faults", "lost_after_s"))
        yield Finding(
            path=("faults", "lost_after_s" if written else "heartbeat_s"),
            message=f"lost_after_s must be at least {BEATS_BEFORE_LOST} heartbeats, {least} s, but "
            f"is {faults.lost_after_s} s; raise it, or lower heartbeat_s={faults.heartbeat_s}",
        )


def _slurm_mistakes(draft: Draft) -> Iterator[Finding]:
    if not draft.sound("resources", "slurm") or not draft.sound("faults", "grace_s"):
        return
    limit_s, grace_s = draft.spec.resources.slurm.limit_s, draft.spec.faults.grace_s
    least_s = 2 * lead_s(grace_s)
    if limit_s is not None and limit_s < least_s:
        yield Finding(
            path=("resources", "slurm", "time"),
            message=f"must be at least {least_s} s, twice what a worker is given to leave before "
            f"the limit (faults.grace_s {grace_s:g} and {LEAD_S} s), but is {limit_s} s; a job "
            "would be queued again before it has done anything",
        )


def _folder_mistakes(draft: Draft) -> Iterator[Finding]:
    data = draft.spec.data
    if draft.sound("data") and isinstance(data, ImageFolder):
        for path, root in _roots(draft, data):
            if wrong := folder_mistake(root):
                yield Finding(path=path, message=wrong)


def _roots(draft: Draft, data: ImageFolder) -> Iterator[tuple[Path, str]]:
    """Every folder that a trial may read, with the path where it stands."""
    parameter = draft.spec.parameters.get("data.root")
    if parameter is None or parameter.when:
        yield ("data", "root"), data.root
    if isinstance(parameter, Values):
        for index, root in enumerate(parameter.values):
            if isinstance(root, str):
                yield ("parameters", "data.root", "values", index), root


def _reference_mistakes(draft: Draft) -> Iterator[Finding]:
    reference = draft.spec.reference
    for index, trial in enumerate(reference.trials if reference else ()):
        base: Path = ("reference", "trials", index, "params")
        if not draft.sound("reference", "trials", index):
            continue
        for path, value in trial.params.items():
            if wrong := path_mistake(draft, path, trial.params):
                yield Finding(path=(*base, path), message=wrong, at="key")
                continue
            for found in refusals(draft, path, value, trial.params):
                yield Finding(path=(*base, path, *found.path), message=found.message, at=found.at)

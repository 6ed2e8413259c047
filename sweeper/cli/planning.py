"""What a study would run, found without running it: ``plan`` and ``launch --dry-run``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from rich.table import Table

from sweeper.cli.printing import duration, out, text
from sweeper.config import TrialConfig, shape_of
from sweeper.report.wording import plural
from sweeper.space import Range, Values, ordered
from sweeper.study.plan import plan
from sweeper.study.spec import Grid, ReferenceOnly, StudySpec

_SIZES_AT_MOST: Final = 256
_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """A study before it runs.

    ``smallest`` and ``largest`` count trainable parameters, None where the data are not there to
    tell the model's shape. ``seconds`` is a rough time on this machine with ``workers`` workers.
    """

    spec: StudySpec
    trials: int
    reference_trials: int
    first: tuple[dict[str, Any], ...]
    smallest: int | None
    largest: int | None
    seconds: float | None
    workers: int


def survey(spec: StudySpec, *, with_reference: bool = False, timed: bool = True) -> Survey:
    """Count trials and parameters, draw the first points, and time a few steps."""
    from sweeper.launchers import automatic_workers
    from sweeper.store import sampling, tickets

    planned = tickets.tickets(spec, with_reference=with_reference)
    fixed = [dict(ticket.values) for ticket in planned if ticket.values is not None]
    free = len(planned) - len(fixed)
    first = [*fixed[:_SHOWN], *sampling.preview(spec, min(free, max(0, _SHOWN - len(fixed))))]
    configs = list(_distinct(spec, itertools.chain(first, fixed, _corners(spec))))
    sizes = list(_sizes(configs))
    wanted = spec.resources.workers
    workers = automatic_workers(spec.resources.gpus_per_worker) if wanted == "auto" else int(wanted)
    workers = max(1, min(workers, len(planned)))
    return Survey(
        spec=spec,
        trials=len(planned),
        reference_trials=sum(ticket.key.startswith("reference/") for ticket in planned),
        first=tuple(first),
        smallest=min(sizes, default=None),
        largest=max(sizes, default=None),
        seconds=_time(spec, first, len(planned), workers) if timed else None,
        workers=workers,
    )


def _corners(spec: StudySpec) -> Iterator[dict[str, Any]]:
    """Points at the ends of every range and at every value of a list, conditions observed."""

    def extend(chosen: dict[str, Any], rest: list[str]) -> Iterator[dict[str, Any]]:
        if not rest:
            yield chosen
            return
        parameter = spec.parameters[rest[0]]
        if not rest[0].startswith(("model.", "data.name")) or not parameter.holds(chosen):
            yield from extend(chosen, rest[1:])
            return
        ends: tuple[Any, ...]
        if isinstance(parameter, Values):
            ends = parameter.values
        elif isinstance(parameter, Range):
            ends = (parameter.low, parameter.high)
        for value in ends:
            yield from extend({**chosen, rest[0]: value}, rest[1:])

    return itertools.islice(extend({}, ordered(spec.parameters)), 4 * _SIZES_AT_MOST)


def _distinct(spec: StudySpec, points: Iterator[dict[str, Any]]) -> Iterator[TrialConfig]:
    """Configurations that differ in their model or the shape of their data."""
    seen: set[str] = set()
    for point in points:
        try:
            config = spec.trial_config(point)
        except ValidationError:
            continue  # a corner of the space that no trial takes
        key = f"{config.model.model_dump_json()} {shape_of(config.data)}"
        if key not in seen:
            seen.add(key)
            yield config
        if len(seen) >= _SIZES_AT_MOST:
            return


def _sizes(configs: list[TrialConfig]) -> Iterator[int]:
    from sweeper.models import parameter_count

    for config in configs:
        shape = shape_of(config.data)
        if shape is not None:
            yield parameter_count(config.model, shape)


def _time(spec: StudySpec, points: list[dict[str, Any]], trials: int, workers: int) -> float | None:
    """Mean seconds of the first configurations, by timing a few steps of each."""
    from sweeper.training import estimate_s

    found = [estimate_s(spec.trial_config(point)) for point in points[:3]]
    known = [seconds for seconds in found if seconds is not None]
    if not known:
        return None
    return sum(known) / len(known) * trials / workers


def public(surveyed: Survey) -> dict[str, Any]:
    """A survey as ``plan --json`` prints it."""
    spec = surveyed.spec
    return {
        "study": spec.name,
        "trials": surveyed.trials,
        "parameters": {
            path: parameter.model_dump(mode="json", exclude_defaults=True)
            for path, parameter in spec.parameters.items()
        },
        "model_parameters": {"smallest": surveyed.smallest, "largest": surveyed.largest},
        "first": list(surveyed.first),
        "seconds": surveyed.seconds,
        "workers": surveyed.workers,
    }


def _described(parameter: Values | Range) -> str:
    if isinstance(parameter, Values):
        long = any(isinstance(value, list | tuple | Mapping) for value in parameter.values)
        return (" | " if long else ", ").join(text(value) for value in parameter.values)
    kind = "whole numbers" if parameter.integer else "numbers"
    extra = ", logarithmic" if parameter.log else ""
    if parameter.step is not None:
        extra += f", step {text(parameter.step)}"
    return f"{kind} from {text(parameter.low)} to {text(parameter.high)}{extra}"


def _condition(when: Mapping[str, tuple[Any, ...]]) -> str:
    return " and ".join(
        f"{text(path)} is {' or '.join(text(value) for value in values)}"
        for path, values in when.items()
    )


def summary_line(surveyed: Survey) -> str:
    """A study in one line, for a list of several."""
    return f"{surveyed.spec.name}: {plural(surveyed.trials, 'trial')}, {_time_said(surveyed)}"


def total_line(surveys: Sequence[Survey]) -> str:
    """What a list of several comes to, one study after the other."""
    known = [each.seconds for each in surveys if each.seconds is not None]
    trials = plural(sum(each.trials for each in surveys), "trial")
    return f"{plural(len(surveys), 'study', 'studies')}: {trials}, about {duration(sum(known))}"


def _time_said(surveyed: Survey) -> str:
    workers = f"with {plural(surveyed.workers, 'worker')}"
    if surveyed.seconds is None:
        return f"time unknown, {workers}"
    return f"about {duration(surveyed.seconds)} {workers}"


def print_plan(surveyed: Survey) -> None:
    """Print a survey for a person."""
    spec, console = surveyed.spec, out()
    console.print(f"[bold]{spec.name}[/] {text(spec.description)}")
    kind = {Grid: "grid points", ReferenceOnly: "published configurations"}.get(
        type(spec.search.sampler), f"trials by {spec.search.sampler.name}"
    )
    extra = f", {surveyed.reference_trials} of them published" if surveyed.reference_trials else ""
    epochs = plural(spec.train.epochs, "epoch")
    console.print(f"  {surveyed.trials} {kind}{extra}, {epochs} each")
    if surveyed.smallest is not None and surveyed.largest is not None:
        sizes = [f"{size:,}" for size in sorted({surveyed.smallest, surveyed.largest})]
        console.print(f"  models of {' to '.join(sizes)} parameters")
    console.print(f"  {_time_said(surveyed)} on this machine")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("parameter", "values", "when"):
        table.add_column(column)
    for path, parameter in spec.parameters.items():
        table.add_row(text(path), _described(parameter), _condition(parameter.when))
    if spec.parameters:
        console.print(table)
    for remark in plan(spec).notes:
        console.print(f"  note: {remark}", style="yellow", markup=False)
    if surveyed.first:
        console.print("first configurations")
        for number, point in enumerate(surveyed.first):
            chosen = ", ".join(f"{text(path)}={text(value)}" for path, value in point.items())
            console.print(f"  {number}: {chosen or 'the study as it is'}")

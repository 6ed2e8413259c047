"""The leaderboard in the form of the reports' tables, and the list of all trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sweeper.report.collect import StudyData
from sweeper.report.configurations import Configuration, identity, resolved, setting
from sweeper.report.reference import spread_cell
from sweeper.report.tables import Cell, Column, Table
from sweeper.report.wording import (
    duration,
    metric_title,
    number,
    short_names,
    value,
)
from sweeper.study.spec import ReferenceOnly

_METRICS: Final = (
    "max_train_accuracy",
    "max_val_accuracy",
    "test_accuracy",
    "min_train_loss",
    "test_loss",
    "model_parameters",
    "mean_seconds",
    "mean_val_seconds",
    "best_epoch",
)
REPEATED: Final = {
    ("val_accuracy", "best"): "max_val_accuracy",
    ("train_accuracy", "best"): "max_train_accuracy",
    ("train_loss", "best"): "min_train_loss",
}
"""Objectives that one of the metrics repeats."""


def leaderboard(data: StudyData) -> Table:
    """One row a configuration with a completed trial, the best first; seeds are put together."""
    ranked = data.ranked
    paths = list(data.factors)
    titles = short_names(paths)
    metrics = _metrics(data, ranked)
    columns = [
        Column(title="rank"),
        *(
            Column(title=titles[path], hint=path, numeric=_numeric(data, ranked, path))
            for path in paths
        ),
        *(
            Column(title=_objective_title(data, index), hint="what the study optimizes")
            for index in range(len(data.now.spec.objective))
        ),
        *(Column(title=metric_title(name), hint=name) for name in metrics),
        Column(title="trials", numeric=False),
    ]
    body = []
    for rank, config in enumerate(ranked, start=1):
        cells = [Cell(text=str(rank), value=rank, tone="best" if rank == 1 else "")]
        cells += [setting_cell(data, config, path) for path in paths]
        cells += [
            spread_cell(objective.metric, config.objective(index), "best" if rank == 1 else "")
            for index, objective in enumerate(data.now.spec.objective)
        ]
        cells += [spread_cell(name, config.metric(name)) for name in metrics]
        numbers = [row.number for row in config.complete]
        cells.append(Cell(text=", ".join(map(str, numbers))))
        body.append(tuple(cells))
    several = any(len(config.complete) > 1 for config in ranked)
    return Table(
        name="leaderboard",
        caption=f"{data.name}: completed trials, the best first",
        columns=tuple(columns),
        rows=tuple(body),
        note="Mean ± standard deviation over the trials of a row, which differ in their seed."
        if several
        else "",
    )


def _objective_title(data: StudyData, index: int) -> str:
    objective = data.now.spec.objective[index]
    return f"{metric_title(objective.metric)}, {objective.at} epoch"


def _metrics(data: StudyData, ranked: Sequence[Configuration]) -> list[str]:
    """Metrics worth a column: measured, not the objective again, and not all the same sizes."""
    objectives = {
        REPEATED.get((objective.metric, objective.at), "") for objective in data.now.spec.objective
    }
    reference = data.now.spec.reference
    asked = {name for trial in reference.trials for name in trial.reported} if reference else set()
    wanted = [*_METRICS, *sorted(asked - set(_METRICS))]
    found = []
    for name in wanted:
        spreads = [config.metric(name) for config in ranked]
        means = {spread.mean for spread in spreads if spread is not None}
        constant = name == "model_parameters" and len(means) < 2
        if means and name not in objectives and not constant:
            found.append(name)
    return found


def setting_cell(data: StudyData, config: Configuration, path: str) -> Cell:
    """What a configuration has at a path."""
    found = setting(data.now.spec, config.resolved, config.params, path)
    plain = isinstance(found, int | float | str) and not isinstance(found, bool)
    return Cell(text=value(found), value=found if plain else None)


def described(data: StudyData, config: Configuration) -> str:
    """What sets a configuration apart from the others: ``lr 0.01, batch size 64``."""
    titles = short_names(data.factors)
    return ", ".join(
        f"{titles[path]} {setting_cell(data, config, path).text}" for path in data.factors
    )


def published_name(data: StudyData, config: Configuration) -> str:
    """What its published row calls a configuration, in a study of such rows and nothing else.

    That is the row's note as far as its first semicolon: “+ dropout; train 0.85 to 0.88”.
    """
    spec = data.now.spec
    if not isinstance(spec.search.sampler, ReferenceOnly) or len(data.found) < 2:
        return ""
    trials = spec.reference.trials if spec.reference else ()
    notes = {identity(resolved(spec, trial.params), trial.params): trial.note for trial in trials}
    return notes.get(config.key, "").partition(";")[0].strip()


def _numeric(data: StudyData, found: Sequence[Configuration], path: str) -> bool:
    """Whether a column holds numbers only, which stand to the right."""
    cells: list[Any] = [
        setting(data.now.spec, config.resolved, config.params, path) for config in found
    ]
    return all(
        each is None or (isinstance(each, int | float) and not isinstance(each, bool))
        for each in cells
    )


def all_trials(data: StudyData) -> Table:
    """Every trial in the order in which they were made, whatever became of it."""
    paths = [path for path in data.now.spec.parameters if path not in data.factors]
    paths = [*data.factors, *(path for path in paths if path.endswith("seed"))]
    titles = short_names(paths)
    first = data.now.spec.objective[0]
    columns = (
        Column(title="trial"),
        Column(title="state", numeric=False),
        Column(title=metric_title(first.metric), hint="the objective, or what was reported last"),
        Column(title="epochs", hint="epochs finished"),
        *(Column(title=titles[path], hint=path, numeric=False) for path in paths),
        Column(title="time"),
        Column(title="worker", numeric=False),
    )
    body = []
    for row in data.now.rows:
        reached = row.values[0] if row.values else row.last_value
        epochs = data.epochs(row)
        state = row.outcome if row.state in {"failed", "pruned"} and row.outcome else row.state
        body.append(
            (
                Cell(text=str(row.number), value=row.number),
                Cell(
                    text=state.replace("_", " "),
                    tone="bad" if row.state == "failed" else "",
                ),
                Cell(text=number(reached), value=reached),
                Cell(text=value(epochs), value=epochs),
                *(Cell(text=value(row.params.get(path))) for path in paths),
                Cell(text=duration(row.seconds), value=row.seconds),
                Cell(text=row.worker or value(None)),
            )
        )
    return Table(
        name="trials",
        caption=f"{data.name}: all trials",
        columns=columns,
        rows=tuple(body),
        open_rows=len(body),
    )

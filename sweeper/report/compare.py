"""Several studies beside each other: one table, and the best configurations' curves."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from sweeper.private import private_folder
from sweeper.report.blocks import Block, Page, Section, Tables, Text, Tile
from sweeper.report.collect import StudyData, device_seconds
from sweeper.report.configurations import Configuration
from sweeper.report.curves import Curve, curves_block, over_trials
from sweeper.report.leaderboard import described
from sweeper.report.reference import length, published, spread_cell, verdict
from sweeper.report.render import render
from sweeper.report.study_page import guarded
from sweeper.report.tables import Cell, Column, Table
from sweeper.report.wording import (
    better_when_higher,
    duration,
    metric_title,
    number,
    plural,
    value,
)
from sweeper.report.write import PAGE, Report, comparison_name, table_files, write_files
from sweeper.settings import Settings
from sweeper.tracking.history import CURVES

_METRICS = (
    "test_accuracy",
    "test_loss",
    "max_train_accuracy",
    "model_parameters",
    "mean_seconds",
    "best_epoch",
)


def write_comparison(
    studies: Sequence[StudyData], settings: Settings, *, out: Path | None = None
) -> Report:
    """Write the page and tables of several studies to ``out`` (``reports/compare-…``).

    Raises UsageError where the folder cannot be written.
    """
    names = [data.name for data in studies]
    folder = out or private_folder(settings.reports) / comparison_name(names)
    table = comparison_table(studies)
    files = table_files([table])
    links = tuple((name, name) for name in files)
    page = comparison_page(studies, table, links=links)
    return Report(folder=folder, files=write_files(folder, {PAGE: render(page), **files}))


def comparison_page(
    studies: Sequence[StudyData], table: Table, *, links: tuple[tuple[str, str], ...] = ()
) -> Page:
    """One table first, then the curves, then what each study asked."""
    first: list[Block] = [Tables(table=table)]
    curves = guarded("the curves", lambda: _curves(studies))
    references = [
        Text(
            text=f"{data.name} against {data.now.spec.reference.source}: "
            f"{verdict(rows, length(data.now.spec, rows))}"
        )
        for data in studies
        if data.now.spec.reference is not None and (rows := published(data))
    ]
    sections = [Section(name="curves", title="Best of each", blocks=tuple(curves))]
    if references:
        sections.append(
            Section(name="published", title="Against published results", blocks=tuple(references))
        )
    return Page(
        title=" and ".join(data.name for data in studies)
        if len(studies) < 4
        else plural(len(studies), "study", "studies"),
        subtitle="Studies beside each other",
        headline=_headline(studies),
        tiles=tuple(_tile(data) for data in studies),
        first=tuple(first),
        sections=tuple(sections),
        links=links,
        footer=f"Written {datetime.now().astimezone():%-d %B %Y, %H:%M %Z} by sweeper.",
    )


def _tile(data: StudyData) -> Tile:
    metric = metric_title(data.now.spec.objective[0].metric)
    if not data.ranked:
        return Tile(label=data.name, value=value(None), detail="no trial has completed")
    best = data.ranked[0]
    reached, tested = best.objective(), best.metric("test_accuracy")
    detail = f"best {metric}"
    if tested is not None:
        detail += f"; test accuracy {number(tested.mean)}"
    return Tile(label=data.name, value=number(reached.mean if reached else None), detail=detail)


def _headline(studies: Sequence[StudyData]) -> str:
    """Which study is ahead, by a test metric that all have or by an objective that all share."""
    for name in ("test_accuracy", "test_loss"):
        scored = [
            (spread.mean, data.name)
            for data in studies
            if data.ranked and (spread := data.ranked[0].metric(name)) is not None
        ]
        if len(scored) == len(studies):
            ahead = max(scored) if better_when_higher(name) else min(scored)
            others = ", ".join(
                f"{other} {number(reached)}" for reached, other in scored if other != ahead[1]
            )
            return (
                f"{ahead[1]} is ahead: the {metric_title(name)} of its best configuration is "
                f"{number(ahead[0])}; {others}."
            )
    return f"{plural(len(studies), 'study', 'studies')}, the best configuration of each."


def comparison_table(studies: Sequence[StudyData]) -> Table:
    """One row a study: its best configuration and what that reached."""
    best = {data.name: data.ranked[0] if data.ranked else None for data in studies}
    names = [
        name
        for name in _METRICS
        if any(config is not None and config.metric(name) for config in best.values())
    ]
    columns = [
        Column(title="study", numeric=False),
        Column(title="data", numeric=False),
        Column(title="model", numeric=False),
        Column(title="objective", numeric=False),
        Column(title="best"),
        *(Column(title=metric_title(name), hint=name) for name in names),
        Column(title="best configuration", numeric=False),
        Column(title="trials", hint="ended of the budget"),
        Column(title="device time"),
    ]
    return Table(
        name="studies",
        caption="The best configuration of each study",
        columns=tuple(columns),
        rows=tuple(_row(data, best[data.name], names) for data in studies),
    )


def _row(data: StudyData, config: Configuration | None, names: Sequence[str]) -> tuple[Cell, ...]:
    spec, now = data.now.spec, data.now
    objective = spec.objective[0]
    seconds = device_seconds(now.rows)
    return (
        Cell(text=data.name),
        Cell(text=spec.data.name),
        Cell(text=spec.model.name),
        Cell(text=f"{objective.direction} {metric_title(objective.metric)}"),
        spread_cell(objective.metric, config.objective() if config else None),
        *(spread_cell(name, config.metric(name) if config else None) for name in names),
        Cell(text=described(data, config) if config else value(None)),
        Cell(text=f"{now.ended} of {now.budget}", value=now.ended),
        Cell(text=duration(seconds), value=round(seconds, 1)),
    )


def _curves(studies: Sequence[StudyData]) -> list[Block]:
    lines = []
    blocks: list[Block] = []
    for data in studies:
        if data.tracker_problem:
            blocks.append(Text(text=f"{data.name}: {data.tracker_problem}.", problem=True))
        if not data.ranked:
            continue
        config = data.ranked[0]
        lines.append(
            Curve(
                label=data.name,
                hint=described(data, config),
                series={
                    metric: over_trials([data.history(row, metric) for row in config.rows])
                    for metric in CURVES
                },
            )
        )
    block = curves_block(lines)
    return [*blocks, block or Text(text="No trial has had a second epoch.")]

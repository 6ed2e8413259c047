"""One study's report as a page of sections; an error in one costs that one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import yaml

from sweeper.config.model import Svm
from sweeper.errors import SweeperError
from sweeper.report.blocks import Block, Facts, Folded, Page, Section, Tables, Text
from sweeper.report.collect import Say, StudyData, provenance, silent
from sweeper.report.leaderboard import all_trials, leaderboard
from sweeper.report.reference import length, published, reference_table, verdict
from sweeper.report.summary import asked, best_configuration, headline, none_completed, tiles
from sweeper.report.wording import plural
from sweeper.settings import Settings

if TYPE_CHECKING:  # torch takes seconds to load, and a report without the model needs none
    from sweeper.report.model import BestModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A page, and the model that was loaded for it, where one was."""

    page: Page
    model: BestModel | None


def study_page(
    data: StudyData,
    settings: Settings,
    *,
    with_model: bool = True,
    limit_s: float = 600.0,
    files: tuple[tuple[str, str], ...] = (),
    say: Say = silent,
) -> Made:
    """The whole report of a study. ``files`` are links to what lies beside it: title, file name.

    ``limit_s`` bounds the time for predicting the test set.
    """
    loaded: list[BestModel] = []
    say("drawing")
    sections = [
        _section("leaderboard", "Leaderboard", lambda: _leaderboard(data)),
        _section("curves", "Training curves", lambda: _curves(data)),
        _section("cost", "Size, time and accuracy", lambda: _cost(data)),
        _section("search", "The search", lambda: _search(data)),
        _section(
            "model",
            "The best model",
            lambda: _model(data, settings, with_model, limit_s, loaded, say),
        ),
        _section("trials", "Trials and failures", lambda: _trials(data)),
        _section("origin", "Where the numbers come from", lambda: _origin(data)),
    ]
    page = Page(
        title=data.name,
        subtitle=data.now.spec.description,
        headline=headline(data),
        tiles=tiles(data),
        first=tuple(guarded("the summary", lambda: _first(data))),
        sections=tuple(section for section in sections if section.blocks),
        links=files,
        footer=f"Written {datetime.now().astimezone():%-d %B %Y, %H:%M %Z} by sweeper.",
    )
    return Made(page=page, model=loaded[0] if loaded else None)


def _section(name: str, title: str, make: Callable[[], Iterable[Block]]) -> Section:
    blocks = guarded(f"the section “{title}”", make)
    return Section(name=name, title=title, blocks=tuple(blocks))


def guarded(what: str, make: Callable[[], Iterable[Block]]) -> list[Block]:
    """The blocks, or one line that says why there are none: a report must not fail a sweep."""
    try:
        return list(make())
    except SweeperError as error:
        _log.warning("%s is missing: %s", what, error)
        return [Text(text=" ".join(str(error).split()), problem=True)]
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one section is its own
        _log.warning("%s could not be made", what, exc_info=True)
        reason = " ".join(str(error).split())
        return [
            Text(text=f"{what} could not be made: {type(error).__name__}: {reason}", problem=True)
        ]


def _first(data: StudyData) -> Iterable[Block]:
    rows = published(data)
    if rows:
        yield Text(text=verdict(rows, length(data.now.spec, rows)))
        yield Tables(table=reference_table(data, rows))
    yield asked(data)
    best = best_configuration(data)
    if best is not None:
        yield best


def _leaderboard(data: StudyData) -> Iterable[Block]:
    table = leaderboard(data)
    if not table.rows:
        yield Text(text=none_completed(data.now))
        return
    yield Tables(table=table)


def _curves(data: StudyData) -> Iterable[Block]:
    from sweeper.report.curves import curves, curves_block

    if data.tracker_problem:
        yield Text(
            text=f"{data.tracker_problem}. Shown is what the store has: the objective only.",
            problem=True,
        )
    lines = curves(data)
    shown = sum(curve.highlighted for curve in lines)
    several = any(len(config.rows) > 1 for config in data.found)
    caption = "Mean over seeds, with one standard deviation to either side. " if several else ""
    if shown < len(lines):
        caption += f"The best {shown} of {len(lines)} are coloured."
    block = curves_block(lines, caption=caption.strip())
    yield block or Text(text="No trial has had a second epoch: there is no curve to draw.")


def _cost(data: StudyData) -> Iterable[Block]:
    from sweeper.report.factors import factor_figures

    yield from factor_figures(data)


def _search(data: StudyData) -> Iterable[Block]:
    from sweeper.report.figures import optuna_figures

    if data.now.counts["complete"] < 2:
        return  # a figure of one point says nothing
    yield from optuna_figures(data)


def _model(
    data: StudyData,
    settings: Settings,
    with_model: bool,
    limit_s: float,
    loaded: list[BestModel],
    say: Say,
) -> Iterable[Block]:
    if not with_model:
        yield Text(text="Left out: the report was asked for without the model.")
        return
    best = data.now.best
    if best is None:
        return
    if isinstance(data.now.spec.trial_config(best.params).model, Svm):
        yield Text(text=f"Trial {best.number} is a support vector machine: no weights are kept.")
        return
    say("loading the best model")
    from sweeper.report.mistakes import confusion, worst_mistakes
    from sweeper.report.model import best_model, best_weights, predict
    from sweeper.report.pictures import weight_galleries

    weights = best_weights(data, settings)
    yield Text(text=f"Trial {weights.trial.number}, with the weights of its best epoch.")
    yield from guarded("the pictures of the weights", lambda: weight_galleries(weights))
    try:
        model = best_model(weights, settings)
    except SweeperError as error:
        yield Text(text=f"No predictions: {' '.join(str(error).split())}", problem=True)
        return
    loaded.append(model)
    said = predict(model, limit_s=limit_s, say=say)
    blocks = [confusion(model, said), worst_mistakes(model, said)]
    yield from (block for block in blocks if block is not None)


def _trials(data: StudyData) -> Iterable[Block]:
    from sweeper.report.outcomes import failures, outcome_table
    from sweeper.report.timeline import timeline

    yield Tables(table=outcome_table(data))
    yield from failures(data)
    figure = timeline(data)
    if figure is not None:
        yield figure
    table = all_trials(data)
    yield Tables(table=table, summary=f"All {plural(len(table.rows), 'trial')}")


def _origin(data: StudyData) -> Iterable[Block]:
    facts = tuple((name, tuple(values)) for name, values in provenance(data).items() if values)
    if facts:
        yield Facts(title="Command, commit, versions, hardware", facts=facts)
    if data.tracker_problem:
        said = f"Versions and hardware are not known: {data.tracker_problem}."
        yield Text(text=said, problem=True)
    yield Folded(summary="The study file, as it was resolved", text=spec_yaml(data))


def spec_yaml(data: StudyData) -> str:
    """The study's spec as a study file."""
    plain = data.now.spec.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)

"""Published results beside ours: reported | measured | difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sweeper.report.collect import StudyData
from sweeper.report.configurations import (
    Configuration,
    Spread,
    identity,
    resolved,
    setting,
    varied,
)
from sweeper.report.tables import Cell, Column, Table, Tone
from sweeper.report.wording import (
    better_when_higher,
    metric,
    metric_title,
    minus,
    plain,
    plural,
    short_names,
    signed,
    value,
)
from sweeper.study.spec import StudySpec

NOT_RUN = "not run"
_AWAITED = frozenset({"waiting", "running"})
_UNSAID = "test_accuracy"
"""What is shown of rows that were published in words only."""

_GAP = 0.02  # two points of accuracy: a gap that wants an explanation
_GAP_SHARE = 0.1  # of other metrics, in parts of what was reported
_MARKED = "Marked: differences of more than two points of accuracy, or a tenth otherwise."
_FIRST = (
    "test_accuracy",
    "test_accuracy_last",
    "max_val_accuracy",
    "max_train_accuracy",
    "train_accuracy",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One published figure. ``measured`` None: no completed trial has it."""

    metric: str
    reported: float
    measured: Spread | None

    @property
    def difference(self) -> float | None:
        """Measured less reported."""
        return None if self.measured is None else self.measured.mean - self.reported

    @property
    def tone(self) -> Tone:
        """Whether the gap is large, and which way; small ones and mere counts have none."""
        gap, higher = self.difference, better_when_higher(self.metric)
        if gap is None or higher is None:
            return ""
        limit = _GAP if "accuracy" in self.metric else _GAP_SHARE * abs(self.reported)
        if abs(gap) <= limit:
            return ""
        return "good" if (gap > 0) is higher else "bad"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published row. ``state``: ``measured``, what became of its trials instead, or
    :data:`NOT_RUN`. ``numbers`` are the trials that count as it, ``beside`` what they reached in
    the metrics that the report gives of other rows, or in :data:`_UNSAID` where it gives none."""

    index: int
    params: Mapping[str, Any]
    note: str
    state: str
    numbers: tuple[int, ...]
    compared: Mapping[str, Compared]
    beside: Mapping[str, Spread]


def published(data: StudyData) -> list[Published]:
    """Every row of the study's reference, matched to whatever trial has its configuration.

    Equal but for the seed is enough, so a grid point counts as the row that it repeats.
    """
    spec = data.now.spec
    if spec.reference is None:
        return []
    known = {config.key: config for config in data.found}
    names = {name for trial in spec.reference.trials for name in trial.reported} or {_UNSAID}
    result = []
    for index, trial in enumerate(spec.reference.trials):
        config = known.get(identity(resolved(spec, trial.params), trial.params))
        result.append(
            Published(
                index=index,
                params=trial.params,
                note=trial.note,
                state=_state(config),
                numbers=tuple(config.numbers) if config else (),
                compared={
                    name: Compared(
                        metric=name,
                        reported=figure,
                        measured=config.metric(name) if config else None,
                    )
                    for name, figure in trial.reported.items()
                },
                beside={
                    name: spread
                    for name in sorted(names - trial.reported.keys())
                    if config and (spread := config.metric(name)) is not None
                },
            )
        )
    return result


def _state(config: Configuration | None) -> str:
    if config is None:
        return NOT_RUN
    if config.complete:
        return "measured"
    last = config.rows[-1]
    if last.state in _AWAITED:
        return last.state
    return (last.outcome or last.state).replace("_", " ")


def verdict(rows: list[Published], length: str = "") -> str:
    """One sentence: how many rows were measured, and how far they are from what was reported.

    ``length`` is how long they were trained, which says at once that a study was shortened.
    """
    done = [row for row in rows if row.state == "measured"]
    if not done:
        none = f"None of {plural(len(rows), 'published row')} has been"
        if all(row.state == NOT_RUN for row in rows):
            return f"{none} run; launch --reference runs them."
        awaited = any(row.state in _AWAITED for row in rows)
        return f"{none} measured yet." if awaited else f"{none} measured."
    said = f"{len(done)} of {plural(len(rows), 'published row')} measured"
    said += f" after {length}" if length else ""
    for name in _order(rows):
        gaps = [
            gap
            for row in done
            if name in row.compared and (gap := row.compared[name].difference) is not None
        ]
        if not gaps:
            continue
        mean = sum(map(abs, gaps)) / len(gaps)
        if "accuracy" not in name:
            return f"{said}; {metric_title(name)} is off by {metric(name, mean)} on average."
        low, high = (minus(f"{100 * gap:+.1f}") for gap in (min(gaps), max(gaps)))
        where = f"{low}" if low == high else f"{low} to {high}"
        off = f", {100 * mean:.1f} on average" if low != high else ""
        return f"{said}; {metric_title(name)} differs by {where} points{off}."
    return f"{said}."


def _order(rows: list[Published]) -> list[str]:
    """The published metrics, the one that counts first."""
    names = list(dict.fromkeys(name for row in rows for name in row.compared))
    return sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def reference_table(data: StudyData, rows: list[Published]) -> Table:
    """The published table: its parameters, then each metric reported, measured and compared."""
    spec = data.now.spec
    metrics = _order(rows)
    points = [(resolved(spec, row.params), row.params) for row in rows]
    paths = varied(spec, points)
    titles = short_names(paths)
    columns = [
        Column(title="#", hint="row of the published table"),
        *(Column(title=titles[path], hint=path, numeric=_numeric(rows, path)) for path in paths),
    ]
    for name in metrics:
        group = metric_title(name)
        columns += [
            Column(title="reported", group=group),
            Column(title="measured", group=group, hint="mean ± standard deviation over seeds"),
            Column(title="difference", group=group, hint="measured less reported"),
        ]
    if not metrics:
        columns.append(Column(title=f"{metric_title(_UNSAID)}, measured", hint=_UNSAID))
    columns.append(Column(title="trials", hint="the trials that were measured", numeric=False))
    if any(row.note for row in rows):
        columns.append(Column(title="note", numeric=False))
    body = []
    for row, (config, _) in zip(rows, points, strict=True):
        cells = [Cell(text=str(row.index + 1), value=row.index + 1)]
        for path in paths:
            found = setting(spec, config, row.params, path)
            cells.append(Cell(text=value(found), value=_sortable(found)))
        for name in metrics:
            cells += _figures(row, name)
        if not metrics:
            cells.append(spread_cell(_UNSAID, row.beside.get(_UNSAID)))
        cells.append(_trials(row))
        if columns[-1].title == "note":
            cells.append(Cell(text=row.note))
        body.append(tuple(cells))
    source = spec.reference.source if spec.reference else ""
    return Table(
        name="reference",
        caption=f"Reported in {source}, and measured here",
        columns=tuple(columns),
        rows=tuple(body),
        note=_note(spec, rows),
        open_rows=40,
    )


def _note(spec: StudySpec, rows: list[Published]) -> str:
    """What the table's marks mean, and how long was trained, as far as there are any."""
    done = [row for row in rows if row.state == "measured"]
    marked = [_MARKED] if any(each.tone for row in done for each in row.compared.values()) else []
    return " ".join([*marked, *([f"Measured after {length(spec, rows)}."] if done else [])])


def length(spec: StudySpec, rows: list[Published]) -> str:
    """How long was trained: a table of a shortened study must say so itself."""
    epochs = {setting(spec, resolved(spec, row.params), row.params, "train.epochs") for row in rows}
    said = plural(epochs.pop(), "epoch") if len(epochs) == 1 else "the epochs of each row"
    return said + (f" of at most {spec.data.limit:,} training images" if spec.data.limit else "")


def _figures(row: Published, name: str) -> list[Cell]:
    """Reported, measured, difference."""
    compared = row.compared.get(name)
    if compared is None:
        nothing = Cell(text=value(None), tone="muted")
        return [nothing, spread_cell(name, row.beside.get(name)), nothing]
    reported = Cell(text=metric(name, compared.reported), value=compared.reported)
    if compared.measured is None:
        state = row.state if row.state != "measured" else "not measured"
        return [reported, Cell(text=state, tone="muted"), Cell(text=value(None), tone="muted")]
    gap = compared.difference
    return [
        reported,
        spread_cell(name, compared.measured),
        Cell(text=signed(name, gap), value=gap, tone=compared.tone),
    ]


def spread_cell(name: str, spread: Spread | None, tone: Tone = "") -> Cell:
    """A mean, with its standard deviation and number of trials where there are several."""
    if spread is None:
        return Cell(text=value(None), tone="muted")
    text = metric(name, spread.mean)
    if spread.deviation is None or (name == "model_parameters" and spread.deviation == 0):
        return Cell(text=text, value=spread.mean, tone=tone)
    decimals = len(text.partition(".")[2])
    shown = plain(spread.deviation, digits=3) if "e" in text else f"{spread.deviation:.{decimals}f}"
    return Cell(
        text=f"{text} ± {shown}",
        value=spread.mean,
        deviation=spread.deviation,
        hint=f"mean and standard deviation of {spread.count} trials",
        tone=tone,
    )


def _trials(row: Published) -> Cell:
    if not row.numbers:
        return Cell(text=NOT_RUN, tone="muted")
    numbers = ", ".join(map(str, row.numbers[:6])) + (" …" if len(row.numbers) > 6 else "")
    return Cell(text=numbers if row.state == "measured" else f"{numbers} ({row.state})")


def _numeric(rows: list[Published], path: str) -> bool:
    found = [row.params.get(path, 0) for row in rows]
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in found)


def _sortable(found: Any) -> float | str | None:
    if isinstance(found, bool) or not isinstance(found, int | float | str):
        return None
    return found

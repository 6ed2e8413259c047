"""Tables as values, and how they are written: CSV, Markdown, LaTeX (HTML is the page's template).

Whatever a study's author or a failed trial wrote arrives here as plain text; each format escapes
it by its own rules.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sweeper.report.wording import NOTHING
from sweeper.store import Standing, TrialRow

Tone = Literal["", "good", "bad", "best", "muted"]
_MARKED: Final = frozenset({"good", "bad"})
"""Tones that are colours on a page and bold type in print."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """``group`` is a heading over neighbouring columns that share it. ``hint`` explains."""

    title: str
    group: str = ""
    hint: str = ""
    numeric: bool = True

    @property
    def whole_title(self) -> str:
        """The title where there is one row of headings only."""
        return f"{self.group}, {self.title}" if self.group else self.title


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """``text`` is what people read, ``value`` what is sorted by and written to CSV, with
    ``deviation`` in a column of its own."""

    text: str
    value: float | str | None = None
    deviation: float | None = None
    tone: Tone = ""
    hint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Every row has one cell a column; the first column names the row.

    ``name`` is a short identifier. On a page ``open_rows`` are shown, further ones folded, and
    none beyond ``most_rows``.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    open_rows: int = 20
    most_rows: int = 1000

    @property
    def grouped(self) -> bool:
        return any(column.group for column in self.columns)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings over columns, each with the number of columns it spans."""
        return [
            (group, len(list(columns)))
            for group, columns in itertools.groupby(self.columns, key=lambda column: column.group)
        ]


def table_csv(table: Table) -> str:
    """One line of titles, then one a row, with values as precise as they were measured.

    A column of means is followed by one of standard deviations, where there is any.
    """
    spread = [
        any(row[index].deviation is not None for row in table.rows)
        for index in range(len(table.columns))
    ]
    titles: list[str] = []
    for column, wide in zip(table.columns, spread, strict=True):
        titles += [inert(column.whole_title)]
        titles += [inert(f"{column.whole_title}, standard deviation")] if wide else []
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(titles)
    for row in table.rows:
        cells: list[Any] = []
        for cell, wide in zip(row, spread, strict=True):
            cells += [_precise(cell.text if cell.value is None else cell.value)]
            cells += ["" if cell.deviation is None else _precise(cell.deviation)] if wide else []
        writer.writerow(cells)
    return stream.getvalue()


def _precise(value: float | int | str) -> float | int | str:
    """A number without the noise of binary fractions; text as it is, a dash as nothing."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, str):
        return "" if value == NOTHING else inert(value)
    return value


def inert(text: str) -> str:
    """``text`` as a CSV cell that no spreadsheet takes for a formula: ``=x`` becomes ``'=x``."""
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def table_markdown(table: Table) -> str:
    """A table in GitHub's Markdown under its caption."""
    heads = [markdown(column.whole_title) for column in table.columns]
    lines = [
        f"**{markdown(table.caption)}**",
        "",
        _piped(heads),
        _piped(["---:" if column.numeric else ":---" for column in table.columns]),
        *(_piped([_markdown_cell(cell) for cell in row]) for row in table.rows),
    ]
    if table.note:
        lines += ["", markdown(table.note)]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell) -> str:
    text = markdown(cell.text)
    return f"**{text}**" if cell.tone in _MARKED else text


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(text: str) -> str:
    """``text`` so that Markdown shows it as it is, on one line."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", flat)


def table_latex(table: Table) -> str:
    """A ``table`` environment for :data:`LATEX_PACKAGES`, made smaller where it is too wide."""
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_latex(table.caption)}}}",
        r"  \resizebox{\ifdim\width>\linewidth \linewidth\else \width\fi}{!}{%",
        rf"  \begin{{tabular}}{{{''.join('r' if c.numeric else 'l' for c in table.columns)}}}",
        r"    \toprule",
        *(f"    {line}" for line in _latex_heads(table)),
        r"    \midrule",
        *(f"    {' & '.join(map(_latex_cell, row))} \\\\" for row in table.rows),
        r"    \bottomrule",
        r"  \end{tabular}}",
    ]
    if table.note:
        lines.append(rf"  \par\smallskip {_latex(table.note)}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex_cell(cell: Cell) -> str:
    text = _latex(cell.text)
    return rf"\textbf{{{text}}}" if cell.tone in _MARKED else text


def _latex_heads(table: Table) -> Iterator[str]:
    if table.grouped:
        spans = [
            rf"\multicolumn{{{span}}}{{c}}{{{_latex(group)}}}" if group else " & " * (span - 1)
            for group, span in table.groups
        ]
        yield " & ".join(spans) + r" \\"
        first = 1
        for group, span in table.groups:
            if group:
                yield rf"\cmidrule(lr){{{first}-{first + span - 1}}}"
            first += span
    yield " & ".join(_latex(column.title) for column in table.columns) + r" \\"


LATEX_PACKAGES: Final = ("booktabs", "graphicx")
_GREEK: Final = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "pi", "rho", "varsigma", "sigma", "tau", "upsilon", "phi"),
    *("chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma"),
    *("Upsilon", "Phi", "Psi", "Omega", "mu"),
)
_LATEX: Final = {
    **{
        letter: rf"$\{name}$"
        for letter, name in zip("αβγδεζηθικλμνξπρςστυφχψωΓΔΘΛΞΠΣΥΦΨΩµ", _GREEK, strict=True)
    },
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "∞": r"$\infty$",
    "…": r"\dots{}",
    "×": r"$\times$",
    "≈": r"$\approx$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\to$",
    **{character: f"\\{character}" for character in "{}$&#_%"},
}


def _latex(text: str) -> str:
    """``text`` so that LaTeX sets it as it is, on one line.

    A bracket or star that begins a row would be taken for an argument of the break before it.
    """
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


_SET: Final = {*map(chr, range(0xA0, 0x180)), *"—‘’“”•"} - {*"«»ÐÞðþĄąĐđĘęĦħĮįĸĿŀŉŊŋŦŧŲųſ"}
"""What pdfLaTeX sets without a further package, beside ASCII."""


def beyond_latex(source: str) -> str:
    """The characters of a LaTeX source that pdfLaTeX may not set, each once."""
    return "".join(sorted({each for each in source if not each.isascii()} - _SET))


def columns(now: Standing) -> tuple[list[str], list[str]]:
    """The parameters and the metrics that any trial has."""
    paths = list(now.spec.parameters)
    paths += sorted({path for row in now.rows for path in row.params} - set(paths))
    metrics = sorted({name for row in now.rows for name in row.metrics})
    return paths, metrics


def trials_csv(now: Standing) -> str:
    """Every trial as it was stored, the best first, those without a result last."""
    paths, metrics = columns(now)
    ranked = now.leaderboard
    known = {row.number for row in ranked}
    rows = [*ranked, *(row for row in now.rows if row.number not in known)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    objectives = [f"objective.{objective.metric}" for objective in now.spec.objective]
    facts = ["trial_seconds", "attempt", "worker", "model_parameters"]
    named = map(inert, [*objectives, *paths, *metrics])
    writer.writerow(["number", "state", "outcome", *named, *facts])
    for row in rows:
        writer.writerow(_cells(row, len(objectives), paths, metrics))
    return stream.getvalue()


def _cells(row: TrialRow, objectives: int, paths: list[str], metrics: list[str]) -> list[Any]:
    values = list(row.values) + [""] * (objectives - len(row.values))
    facts = [row.seconds, row.attempt, inert(row.worker or ""), row.model_parameters]
    return [
        row.number,
        row.state,
        row.outcome or "",
        *values,
        *(_cell(row.params[path]) if path in row.params else "" for path in paths),
        *(row.metrics.get(name, "") for name in metrics),
        *("" if fact is None else fact for fact in facts),
    ]


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return inert(value)
    return value if isinstance(value, int | float) else json.dumps(value)

"""A report's files on disk: the page, and the tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sweeper.errors import UsageError
from sweeper.private import private_folder
from sweeper.report.collect import Say, StudyData, silent
from sweeper.report.leaderboard import leaderboard
from sweeper.report.reference import published, reference_table
from sweeper.report.render import render
from sweeper.report.study_page import study_page
from sweeper.report.tables import (
    LATEX_PACKAGES,
    Table,
    beyond_latex,
    table_csv,
    table_latex,
    table_markdown,
    trials_csv,
)
from sweeper.settings import Settings

if TYPE_CHECKING:
    from sweeper.report.model import BestModel

PAGE: Final = "index.html"
_LONGEST_NAME: Final = 120


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written: the page and every file, and the model that was loaded for it."""

    folder: Path
    files: tuple[Path, ...]
    model: BestModel | None = None

    @property
    def page(self) -> Path:
        return self.folder / PAGE


def write_report(
    data: StudyData,
    settings: Settings,
    *,
    out: Path | None = None,
    with_model: bool = True,
    limit_s: float = 600.0,
    say: Say = silent,
) -> Report:
    """Write a study's report to ``out`` (``reports/<study>`` in the home folder).

    ``limit_s`` bounds the time for predicting the test set. Raises UsageError where the folder
    cannot be written.
    """
    tables = {**_tables(data), "trials.csv": trials_csv(data.now)}
    made = study_page(
        data,
        settings,
        with_model=with_model,
        limit_s=limit_s,
        files=tuple((name, name) for name in tables),
        say=say,
    )
    folder = out or private_folder(settings.reports) / data.name
    files = write_files(folder, {PAGE: render(made.page), **tables})
    return Report(folder=folder, files=files, model=made.model)


def _tables(data: StudyData) -> dict[str, str]:
    """File name → the leaderboard, and the published table beside ours where there is one."""
    found = [leaderboard(data)]
    if rows := published(data):
        found.append(reference_table(data, rows))
    return table_files(found)


def table_files(found: Sequence[Table]) -> dict[str, str]:
    """File name → all tables in one file of each format; CSV knows one table a file.

    What is to be read or printed has the first rows, CSV has all.
    """
    short = [_first_rows(table) for table in found]
    return {
        "table.md": "\n".join(map(table_markdown, short)),
        "table.tex": _latex_file(short),
        **{f"{table.name}.csv": table_csv(table) for table in found},
    }


def _latex_file(tables: Sequence[Table]) -> str:
    """All tables, under what a document must have for them."""
    text = "\n".join(map(table_latex, tables))
    needs = f"% needs \\usepackage{{{','.join(LATEX_PACKAGES)}}}\n"
    if unknown := beyond_latex(text):
        needs += f"% pdfLaTeX may lack these; LuaLaTeX needs a font that has them: {unknown}\n"
    return needs + text


def _first_rows(table: Table) -> Table:
    if len(table.rows) <= table.open_rows:
        return table
    said = f"The first {table.open_rows} of {len(table.rows)} rows; all are in {table.name}.csv."
    return replace(table, rows=table.rows[: table.open_rows], note=f"{table.note} {said}".strip())


def comparison_name(names: Sequence[str]) -> str:
    """The folder of a comparison; many or long names are cut, and told apart by a digest."""
    whole = "compare-" + "-".join(names)
    if len(whole) <= _LONGEST_NAME:
        return whole
    digest = hashlib.sha256("/".join(names).encode()).hexdigest()[:8]
    return f"{whole[: _LONGEST_NAME - 9]}-{digest}"


def write_files(folder: Path, contents: Mapping[str, str]) -> tuple[Path, ...]:
    """Write every file under a temporary name first: a reader finds the old one or the new one.

    Raises UsageError where the folder cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            written.append(_write(folder / name, text))
    except OSError as error:
        raise UsageError(
            f"the report must be written to {folder}, but: {error.strerror}; "
            "name another folder with --out"
        ) from error
    return tuple(written)


def _write(target: Path, text: str) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return target

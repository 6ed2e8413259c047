"""``sweeper report``: a study's results as a page and tables, or several studies compared."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from sweeper.cli.options import HomeOption, JsonOption, StoreOption
from sweeper.errors import UsageError
from sweeper.settings import Settings


def report(
    names: Annotated[
        list[str], typer.Argument(metavar="STUDY...", help="A study's name; several are compared.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder to write to. [default: reports/STUDY in the home folder]",
            show_default=False,
        ),
    ] = None,
    no_model: Annotated[
        bool,
        typer.Option("--no-model", help="Leave out what the best model's weights and data show."),
    ] = False,
    allow_imports: Annotated[
        bool,
        typer.Option(
            "--allow-imports", help="Import the best model where it is one of the study's own."
        ),
    ] = False,
    store: StoreOption = None,
    home: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a study's report: an HTML page, and CSV, Markdown and LaTeX tables."""
    if len(set(names)) < len(names):
        raise UsageError("every study must be named once, but one is there twice")
    from sweeper.report.collect import collect
    from sweeper.store import open_store, studies

    settings = Settings.resolve(home=home, store=store)
    opened = open_store(settings.store_url)
    loaded = [studies.load(opened, name) for name in names]
    with saying() as say:
        found = [
            collect(opened, study, settings, allow_imports=allow_imports, say=say)
            for study in loaded
        ]
        if len(found) == 1:
            from sweeper.report.write import write_report

            written = write_report(found[0], settings, out=out, with_model=not no_model, say=say)
        else:
            from sweeper.report.compare import write_comparison

            written = write_comparison(found, settings, out=out)
    if json_:
        from sweeper.cli.printing import print_json

        print_json({"page": str(written.page), "files": [str(file) for file in written.files]})
    else:
        sys.stdout.write(f"{written.page}\n")


@contextlib.contextmanager
def saying() -> Iterator[Callable[[str], None]]:
    """Shows what is being done: a line that changes on a terminal, a line a step elsewhere."""
    from sweeper.cli.printing import err, redraws

    console = err()
    if redraws(console):
        with console.status("report") as status:
            yield lambda text: status.update(f"report: {text}")
        return
    told: set[str] = set()

    def say(text: str) -> None:
        step = text.partition(":")[0]
        if step not in told:
            told.add(step)
            console.print(f"report: {step}", markup=False)

    yield say

"""Options that several commands share, each with its environment variable in the help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="SWEEPER_STORE",
        metavar="URL",
        help="SQL database of the studies. [default: SQLite in the home folder]",
        show_default=False,
    ),
]
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar="SWEEPER_HOME",
        help="Folder of databases, artifacts and logs. [default: .sweeper]",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a value of the study file; repeatable.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A study file.")]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name.")]

"""Options that several commands share, each with its environment variable in the help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sweeper.errors import UsageError
from sweeper.settings import has_password


def _fit_to_be_typed(
    context: typer.Context, parameter: typer.CallbackParam, url: str | None
) -> str | None:
    """Refuse a password that was typed: everybody on the machine reads command lines.

    And nothing at all, which an empty variable of a shell leaves: it would mean another store.
    """
    source = context.get_parameter_source(str(parameter.name))
    if url is None or source is None or source.name != "COMMANDLINE":
        return url
    if not url.strip():
        raise UsageError(
            "--store must be followed by a URL, but got nothing; for the store in the home folder "
            "leave the option out"
        )
    if has_password(url):
        raise UsageError(
            "the URL given with --store must hold no password, for everybody on this machine can "
            "read command lines; leave it out and set PGPASSWORD or PGPASSFILE (~/.pgpass), or "
            "give the whole URL in SWEEPER_STORE, or in a file that SWEEPER_STORE_FILE names"
        )
    return url


def _home(path: str) -> Path:
    """Refuse nothing at all: it would mean the current folder."""
    if not path.strip():
        raise UsageError(
            "--home must be followed by a folder, but got nothing; for .sweeper leave the option "
            "out"
        )
    return Path(path)


StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="SWEEPER_STORE",
        metavar="URL",
        help="SQL database of the studies; for a worker also grpc://HOST:PORT. "
        "[default: SQLite in the home folder]",
        show_default=False,
        callback=_fit_to_be_typed,
    ),
]
HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar="SWEEPER_HOME",
        metavar="PATH",
        parser=_home,
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

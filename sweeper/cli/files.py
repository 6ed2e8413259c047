"""Commands about study files: ``validate``, ``plan``, ``init``, ``schema``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sweeper.cli.options import FileArgument, JsonOption, SetOption
from sweeper.cli.plain import plain
from sweeper.errors import Mistake, StudyFileError, UsageError


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Study files.")],
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Name every mistake in study files, with line and column."""
    from sweeper.study.parse import load

    mistakes: list[Mistake] = []
    for file in files:
        try:
            load(file, set_ or ())
        except StudyFileError as error:
            mistakes.extend(error.mistakes)
    if json_:
        from sweeper.cli.printing import print_json

        print_json([dataclasses.asdict(mistake) for mistake in mistakes])
    elif mistakes:
        sys.stderr.write(plain("".join(f"{mistake}\n" for mistake in mistakes)))
    else:
        sys.stdout.write(plain("".join(f"{file}: valid\n" for file in files)))
    if mistakes:
        raise typer.Exit(2)


def plan(
    file: FileArgument,
    set_: SetOption = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Count the published trials as well.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Show what a study would run: space, trials, sizes of the models, first configurations."""
    from sweeper.cli.planning import print_plan, public, survey
    from sweeper.study.parse import load

    surveyed = survey(load(file, set_ or ()), with_reference=reference)
    if json_:
        from sweeper.cli.printing import print_json

        print_json(public(surveyed))
    else:
        print_plan(surveyed)


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(
        "study.yaml"
    ),
) -> None:
    """Write a commented study file to start from."""
    from importlib import resources

    template = resources.files("sweeper.study").joinpath("template.yaml").read_text("utf-8")
    created = False
    try:
        with file.open("x", encoding="utf-8") as stream:
            created = True
            stream.write(template)
    except FileExistsError as error:
        raise UsageError(f"{file} is there already; name another file") from error
    except OSError as error:
        if created:
            file.unlink(missing_ok=True)  # half a file would be in the way of the next try
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error
    sys.stdout.write(f"wrote {file}; run it with: sweeper launch {file}\n")


def schema() -> None:
    """Print the JSON Schema of study files, for completion in an editor."""
    from sweeper.cli.printing import print_json
    from sweeper.study.schema import json_schema

    document: dict[str, Any] = json_schema()
    print_json(document)

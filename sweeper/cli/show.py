"""Commands that look at a study in the store, or ask its workers for something."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sweeper.cli.options import HomeOption, JsonOption, StoreOption, StudyArgument
from sweeper.cli.plain import plain
from sweeper.errors import UsageError
from sweeper.settings import Settings, run_key

if TYPE_CHECKING:
    from pathlib import Path

    from sweeper.store import Control, Store, StoredStudy


@contextlib.contextmanager
def _opened(settings: Settings) -> Iterator[Store]:
    """The store while the context lasts."""
    from sweeper.store import open_store

    with contextlib.closing(open_store(settings.store_url)) as opened:
        yield opened


def status(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="One study.")] = None,
    store: StoreOption = None,
    home: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Show how studies stand: trials by state, the best so far."""
    from sweeper.cli.printing import number, out, print_json
    from sweeper.store import Control, progress, studies

    with _opened(Settings.resolve(home=home, store=store)) as opened:
        loaded = [studies.load(opened, study)] if study else _readable(opened)
        found = [progress(opened, each) for each in loaded]
        asked = [studies.asked(opened, each.id) for each in loaded]
    if json_:
        print_json(
            [
                {
                    "study": now.spec.name,
                    "trials": now.counts,
                    "outcomes": now.outcomes,
                    "budget": now.budget,
                    "control": str(control),
                    "stopped": reason or None,
                    "best": None
                    if now.best is None
                    else {"number": now.best.number, "values": now.best.values},
                }
                for now, (control, reason) in zip(found, asked, strict=True)
            ]
        )
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    words = ("study", "outcomes")
    columns = ("study", "ended", "complete", "pruned", "failed", "running", "waiting", "best")
    for column in (*columns, "outcomes"):
        table.add_column(column, justify="left" if column in words else "right")
    for now in found:
        counts = now.counts
        best = "–" if now.best is None else f"{number(now.best.values[0])} (#{now.best.number})"
        states = ("complete", "pruned", "failed", "running", "waiting")
        table.add_row(
            now.spec.name,
            f"{now.ended}/{now.budget}",
            *(str(counts[state]) for state in states),
            best,
            ", ".join(f"{count} {outcome}" for outcome, count in now.outcomes.items()),
        )
    out().print(table if found else "no study in this store yet")
    for now, (control, reason) in zip(found, asked, strict=True):
        if control is not Control.RUN:
            why = f": {plain(reason)}" if reason else ""
            out().print(f"{now.spec.name} is asked to {control}{why}", markup=False)


def _readable(store: Store) -> list[StoredStudy]:
    """All studies, but for those that this version cannot read, of which is said why."""
    from sweeper.store import studies

    found = []
    for name in studies.names(store):
        try:
            found.append(studies.load(store, name))
        except UsageError as error:
            sys.stderr.write(plain(f"sweeper: {error}\n"))
    return found


def trials(
    study: StudyArgument,
    store: StoreOption = None,
    home: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """List a study's trials, the best first."""
    from sweeper.cli.printing import out, print_json, trial_table
    from sweeper.store import standing, studies
    from sweeper.tracking import find_run_ids

    settings = Settings.resolve(home=home, store=store)
    with _opened(settings) as opened:
        now = standing(opened, studies.load(opened, study))
    if json_:
        rows = [row.public() for row in now.rows]
        if any(row["run_id"] is None and row["state"] != "waiting" for row in rows):
            known = find_run_ids(settings, study, now.owner)
            for row, trial in zip(rows, now.rows, strict=True):
                row["run_id"] = row["run_id"] or known.get(run_key(study, trial.origin))
        print_json(rows)
        return
    ranked = now.leaderboard
    numbers = {row.number for row in ranked}
    rest = [row for row in now.rows if row.number not in numbers]
    out().print(trial_table(now.spec, [*ranked, *rest], study))


def best(
    study: StudyArgument,
    store: StoreOption = None,
    home: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Show the best trial: what it reached, and with which configuration."""
    from sweeper.cli.printing import number, out, print_json, text
    from sweeper.store import standing, studies

    with _opened(Settings.resolve(home=home, store=store)) as opened:
        now = standing(opened, studies.load(opened, study))
    row = now.best
    if row is None:
        sys.stderr.write(f"sweeper: no trial of {study!r} has completed\n")
        raise typer.Exit(1)
    if json_:
        config = now.spec.trial_config(row.params).model_dump(mode="json")
        print_json({**row.public(), "values": row.values, "config": config})
        return
    console = out()
    console.print(f"[bold]trial {row.number}[/] of {study}")
    for objective, value in zip(now.spec.objective, row.values, strict=True):
        console.print(f"  {objective.metric:<22} {number(value)}  ({objective.direction}d)")
    for name in ("test_accuracy", "test_loss", "best_epoch"):
        if name in row.metrics:
            console.print(f"  {name:<22} {number(row.metrics[name])}")
    for path, value in row.params.items():
        console.print(f"  {text(path):<22} {text(value)}")


def _ask(study: str, store: str | None, home: Path | None, what: str, said: str) -> None:
    from sweeper.store import Control, studies

    with _opened(Settings.resolve(home=home, store=store)) as opened:
        studies.ask(opened, studies.load(opened, study).id, Control(what))
    sys.stdout.write(f"{study}: {said}\n")


def pause(study: StudyArgument, store: StoreOption = None, home: HomeOption = None) -> None:
    """Take no new trial until the study is resumed; running trials go on."""
    _ask(study, store, home, "pause", "paused; running trials go on to their end")


def resume(study: StudyArgument, store: StoreOption = None, home: HomeOption = None) -> None:
    """Let the workers of a paused or stopped study take trials again."""
    from sweeper.store import studies

    with _opened(Settings.resolve(home=home, store=store)) as opened:
        _, why = studies.asked(opened, studies.load(opened, study).id)
    _ask(
        study,
        store,
        home,
        "run",
        f"resumed; it had been stopped: {plain(why)}" if why else "resumed",
    )


def stop(study: StudyArgument, store: StoreOption = None, home: HomeOption = None) -> None:
    """Let running trials end, and take no new one."""
    _ask(study, store, home, "stop", "stopping; running trials go on to their end")


def cancel(study: StudyArgument, store: StoreOption = None, home: HomeOption = None) -> None:
    """End running trials at their next epoch, and take no new one."""
    _ask(study, store, home, "cancel", "cancelling; running trials end at their next epoch")


def extend(
    study: StudyArgument,
    more: Annotated[
        int, typer.Argument(metavar="N", min=1, help="So many trials beside those it has.")
    ],
    store: StoreOption = None,
    home: HomeOption = None,
) -> None:
    """Add N trials to a study's budget; its workers take them."""
    from sweeper.controller import extend as extended
    from sweeper.store import progress, studies

    with _opened(Settings.resolve(home=home, store=store)) as opened:
        found = extended(opened, study, more)
        budget = progress(opened, found).budget
        control, why = studies.asked(opened, found.id)
    sys.stdout.write(f"{study}: a budget of {budget} trials, {more} more\n")
    sys.stdout.write(_if_asked(study, control, why))


def enqueue(
    study: StudyArgument,
    values: Annotated[
        list[str],
        typer.Argument(metavar="PATH=VALUE...", help="Values of its parameters, in YAML."),
    ],
    store: StoreOption = None,
    home: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Add a trial with values of your choice, taken before those that the sampler is to choose."""
    from sweeper.cli.printing import print_json
    from sweeper.controller import enqueue as enqueued
    from sweeper.report.wording import value as worded
    from sweeper.store import studies

    with _opened(Settings.resolve(home=home, store=store)) as opened:
        found = enqueued(opened, study, values)
        control, why = studies.asked(opened, found.study.id)
    if json_:
        print_json(
            {
                "study": study,
                "number": found.number,
                "params": dict(found.values),
                "open": list(found.open),
                "control": str(control),
            }
        )
        return
    given = ", ".join(f"{path} = {worded(value)}" for path, value in found.values.items())
    rest = f"; the sampler chooses {', '.join(found.open)}" if found.open else ""
    sys.stdout.write(plain(f"{study}: trial {found.number} with {given}{rest}\n"))
    sys.stdout.write(_if_asked(study, control, why))


def _if_asked(study: str, control: Control, why: str) -> str:
    """That nobody takes a trial of the study now, if that is so."""
    if control == "run":
        return ""
    return f"{study} is asked to {control}: {plain(why) or f'sweeper resume {study}'}\n"


def retry(study: StudyArgument, store: StoreOption = None, home: HomeOption = None) -> None:
    """Put every failed trial back into the queue."""
    from sweeper.store import Control, recovery, studies

    with _opened(Settings.resolve(home=home, store=store)) as opened:
        stored = studies.load(opened, study)
        with opened.exclusively():
            numbers = recovery.retry(opened, stored.id)
        if numbers and studies.asked(opened, stored.id)[1]:  # a controller had stopped it
            studies.ask(opened, stored.id, Control.RUN)
    if not numbers:
        raise UsageError(f"{study!r} has no failed trial to retry")
    sys.stdout.write(f"{study}: {len(numbers)} trials are waiting again\n")

"""Commands that serve or look after the whole: ``worker``, ``ui``, ``sync``, ``doctor``."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from sweeper.address import refuse_tracking_uri
from sweeper.cli.options import HomeOption, JsonOption, StoreOption
from sweeper.cli.plain import PlainFormatter, plain
from sweeper.errors import UsageError
from sweeper.settings import Settings, masked

_OPENING_S: Final = 300.0
"""A worker that is started with its database, or in an outage, waits so long for it."""


def worker(
    study: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help="Train this study until it is over.")
    ] = None,
    count: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Start so many workers on this machine and keep them alive; "
            "auto: one a GPU, or one a core where there is none.",
        ),
    ] = None,
    store: StoreOption = None,
    home: HomeOption = None,
    allow_imports: Annotated[
        bool,
        typer.Option(
            "--allow-imports", help="Import models of their own (package.module:name) for studies."
        ),
    ] = False,
    tied: Annotated[
        bool, typer.Option("--tied", hidden=True, help="End with the process that started it.")
    ] = False,
) -> None:
    """Pull trials and train them; without a study, serve every running study and wait for more."""
    from sweeper.checkpoints import refuse_unusable
    from sweeper.launchers.forks import fork_as_asked

    fork_as_asked(_import_everything)
    parent = os.getppid() if tied else None
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[to_stderr])
    settings = Settings.resolve(home=home, store=store)
    refuse_tracking_uri(settings.tracking_uri)
    refuse_unusable(settings.checkpoints)
    if count is not None:
        _replicas(study, count, settings, allow_imports=allow_imports)
        return
    from sweeper.store import open_store
    from sweeper.tracking import SpoolTracker
    from sweeper.tracking.service import address
    from sweeper.worker import Signals, StopNowError, Worker, patiently, run_ids_into

    signals, over = Signals(), False
    signals.install()
    with contextlib.suppress(StopNowError):
        opened = patiently(
            lambda: open_store(settings.store_url), "open the store", signals, give_up_s=_OPENING_S
        )
        with SpoolTracker(
            settings.spool, address(settings), on_run_id=run_ids_into(opened)
        ) as tracker:
            over = Worker(
                store=opened,
                tracker=tracker,
                settings=settings,
                study=study,
                parent=parent,
                allow_imports=allow_imports,
                signals=signals,
            ).run()
    if not over:
        raise _told_by(signals.number)


def _told_by(number: int | None) -> typer.Exit:
    """The end of who was told to end; 0 would say that nothing is left to do."""
    return typer.Exit(128 + (number or signal.SIGTERM))


def _import_everything() -> None:
    """What every worker needs sooner or later."""
    import sweeper.training
    import sweeper.worker  # noqa: F401 - for the time that it takes
    from sweeper.tracking import mlflow

    mlflow.load()


def _replicas(study: str | None, count: str, settings: Settings, *, allow_imports: bool) -> None:
    """Keep several workers alive, each a process of its own, until TERM or INT."""
    from sweeper.launchers import PYTHON, Job, LocalLauncher, Replicas, automatic_workers

    if count != "auto" and not (count.isdecimal() and int(count) > 0):
        raise UsageError(f"--count must be a number from 1 on, or auto, but got {count!r}")
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: received.append(number))
    with tempfile.TemporaryDirectory(prefix="sweeper-logs-") as folder:
        done = Replicas(
            launcher=LocalLauncher(),
            job=Job(
                argv=[
                    *(PYTHON, "-m", "sweeper", "worker"),
                    *filter(None, [study]),
                    "--tied",
                    *(["--allow-imports"] if allow_imports else []),
                ],
                environment=settings.environment(),
                logs=Path(folder),
                forks=True,
            ),
            count=automatic_workers(1.0) if count == "auto" else int(count),
        ).run(lambda: len(received))
    if not done:
        raise _told_by(received[-1])


def ui(
    store: StoreOption = None,
    home: HomeOption = None,
) -> None:
    """Serve the MLflow web UI on this home folder, or this store, until Ctrl-C."""
    from sweeper.tracking import LocalServer

    settings = Settings.resolve(home=home, store=store)
    if settings.tracking_uri:
        sys.stdout.write(f"MLflow is at {masked(settings.tracking_uri)}\n")
        return
    with LocalServer(settings) as server:
        sys.stdout.write(f"MLflow is at {server.ensure()}; Ctrl-C ends it\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(5)
                server.ensure()
        except KeyboardInterrupt:
            sys.stderr.write("\n")


def sync(store: StoreOption = None, home: HomeOption = None) -> None:
    """Send to MLflow what could not reach it, and what it refused once more."""
    from sweeper.service.agreement import settle_all
    from sweeper.tracking import TrackingService

    settings = Settings.resolve(home=home, store=store)
    refuse_tracking_uri(settings.tracking_uri)
    with TrackingService(settings) as service:
        sent = service.replay(refused_too=True)
        ended = 0 if sent.problem else settle_all(settings)
    sys.stdout.write(
        f"{sent.delivered} records sent, {sent.rejected} refused by MLflow, {sent.left} left"
        + (f", {sent.live} workers are still writing" if sent.live else "")
        + (f", {ended} runs ended for workers that could not" if ended else "")
        + "\n"
    )
    if sent.problem:
        sys.stderr.write(plain(f"sweeper: {sent.problem}\n"))
        raise typer.Exit(3)


def doctor(
    study: Annotated[
        str | None,
        typer.Option("--study", help="Compare what the store and MLflow have of this study."),
    ] = None,
    store: StoreOption = None,
    home: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Check store, MLflow, checkpoints, GPU, data folders and versions, and say what to do."""
    from sweeper.cli.checks import examine
    from sweeper.cli.printing import out, print_json

    if study is not None:
        _compare(study, Settings.resolve(home=home, store=store), json_=json_)
        return
    findings = examine(Settings.resolve(home=home, store=store))
    if json_:
        print_json([finding.public() for finding in findings])
    else:
        console = out()
        for finding in findings:
            mark = {"good": "[green]ok  [/]", "note": "[dim]note[/]", "bad": "[red]bad [/]"}
            console.print(f"{mark[finding.verdict]} {finding.subject:<11} ", end="")
            console.print(finding.found, markup=False)
            if finding.advice:
                console.print(f"                 {finding.advice}", markup=False)
    if any(finding.verdict == "bad" for finding in findings):
        raise UsageError("something above must be put right first")


def _compare(study: str, settings: Settings, *, json_: bool) -> None:
    """Print on what the store and MLflow differ; exit code 1 where they do."""
    from sweeper.cli.printing import print_json
    from sweeper.service.agreement import differences
    from sweeper.store import open_store, standing, studies

    with contextlib.closing(open_store(settings.store_url)) as opened:
        now = standing(opened, studies.load(opened, study))
    found = differences(now, settings)
    if json_:
        print_json(found)
    elif found:
        sys.stdout.write(plain("".join(f"{line}\n" for line in found)))
    else:
        sys.stdout.write(f"{study}: the store and MLflow agree on all {now.budget} trials\n")
    if found:
        raise typer.Exit(1)

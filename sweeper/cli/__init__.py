"""The command line. Each command parses, calls one function, and prints.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 no trial succeeded, 2 wrong
usage or file, 3 store or tracker out of reach, 130 interrupted, 143 a worker that got TERM.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Final, NoReturn

import typer

from sweeper.cli import files, launch, reporting, servers, serving, show
from sweeper.cli.ending import end_process
from sweeper.cli.plain import plain
from sweeper.errors import OutOfReachError, SweeperError

_DISK: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG}
"""What a disk or its owner refuses, wherever something is written."""

_WAITING: Final = ("OMP_WAIT_POLICY", "PASSIVE")
"""How torch's threads wait for each other, unless the environment says something else. OpenMP's own
way keeps the cores busy with waiting: a report that tests a model beside one process on another of
two cores took 24 s for what takes 2."""

app = typer.Typer(
    name="sweeper",
    help="Hyper-parameter sweeps: Optuna samples, GPU workers train, MLflow keeps every run.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("launch")(launch.launch)
app.command("validate")(files.validate)
app.command("plan")(files.plan)
app.command("init")(files.init)
app.command("schema")(files.schema)
app.command("status")(show.status)
app.command("trials")(show.trials)
app.command("best")(show.best)
app.command("report")(reporting.report)
app.command("pause")(show.pause)
app.command("resume")(show.resume)
app.command("stop")(show.stop)
app.command("cancel")(show.cancel)
app.command("extend")(show.extend)
app.command("enqueue")(show.enqueue)
app.command("retry")(show.retry)
app.command("ui")(servers.ui)
app.command("sync")(servers.sync)
app.command("doctor")(servers.doctor)
app.command("worker")(servers.worker)
app.command("workers")(serving.workers)
app.command("controller")(serving.controller)


def run() -> NoReturn:
    """The program ``sweeper``: :func:`main`, and then this process ends."""
    _complete_streams()
    try:
        main()
    except SystemExit as asked:
        end_process(asked)
    end_process(SystemExit(0))


def _complete_streams() -> None:
    """Every command may write: nowhere where a stream is closed, and whatever a stream can spell.

    So ``sweeper status >&-`` ends with its own exit code, and a name that an ASCII terminal cannot
    show appears as ``\\xe9``.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open to the end
            setattr(sys, name, nowhere)
        getattr(sys, name).reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line; a user's mistake becomes a message and an exit code."""
    os.environ.setdefault(*_WAITING)  # before torch is loaded, which reads it once
    try:
        app()
    except SweeperError as error:
        sys.stderr.write(plain(f"sweeper: {error}\n"))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        sys.stderr.write(plain(f"sweeper: files must be written, but: {reason}\n"))
        sys.exit(OutOfReachError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)

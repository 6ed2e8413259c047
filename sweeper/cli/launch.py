"""``sweeper launch``: from a study file to the best trial."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from sweeper.cli.options import HomeOption, JsonOption, SetOption, StoreOption
from sweeper.cli.plain import plain
from sweeper.errors import UsageError
from sweeper.settings import Settings, group_name, masked

if TYPE_CHECKING:
    from sweeper.cli.watching import Caller
    from sweeper.controller import Prepared, Sweep
    from sweeper.launchers import Launcher, LauncherName
    from sweeper.store import Standing, Store, StoredStudy
    from sweeper.study.spec import StudySpec
    from sweeper.tracking import TrackingService

_OTHERS_S: Final = 600.0
"""A controller that is just finishing the same study is waited for."""
_TIME_IS_UP: Final = "the time that --hours gave is up; launch again to go on"


def launch(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Study files.")],
    set_: SetOption = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Number of trials, instead of the file's.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of workers. [default: as the file says]")
    ] = None,
    launcher: Annotated[
        Literal["local", "ray", "slurm"],
        typer.Option(help="Where workers are started: on this machine or on a cluster."),
    ] = "local",
    reference: Annotated[
        bool, typer.Option("--reference", help="Run the published configurations first.")
    ] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add to the budget of a study that is there.")
    ] = False,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Enqueue the trials, start the workers of a cluster's launcher, leave."
        ),
    ] = False,
    hours: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="After so many hours let the workers end their epochs, put their trials back and "
            "write the report; launch again to go on.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, and run nothing.")
    ] = False,
    store: StoreOption = None,
    home: HomeOption = None,
    json_: JsonOption = False,
) -> None:
    """Run a study: validate it, create or resume it, train its trials, name the best."""
    from sweeper.study.parse import load

    overrides = [*(set_ or []), *([f"search.trials={trials}"] if trials else [])]
    specs = [load(file, overrides) for file in files]
    if len({spec.name for spec in specs}) < len(specs):
        raise UsageError("every study must have a name of its own, but two files share one")
    if dry_run:
        _dry_run(specs, reference=reference, json_=json_)
        return
    if detach and hours is not None:
        raise UsageError(
            "--hours must be the time of a launch that stays, but got --detach too; leave one out"
        )
    settings = Settings.resolve(home=home, store=store)
    how = _How(
        launcher=launcher,
        workers=workers,
        reference=reference,
        extend=extend,
        detached=detach,
        until=math.inf if hours is None else time.monotonic() + hours * 3600,
    )
    results: list[dict[str, Any]] = []
    try:
        for result in _results(specs, settings, how):
            results.append(result)
    finally:  # what is done is told, whatever became of the rest
        if json_ and results:
            from sweeper.cli.printing import print_json

            print_json(results[0] if len(specs) == 1 else results)
    if not detach and any(result["best"] is None for result in results):
        raise typer.Exit(1)


def _results(specs: list[StudySpec], settings: Settings, how: _How) -> Iterator[dict[str, Any]]:
    """One study after the other; each was found fit to be begun before the first is."""
    from sweeper.checkpoints import refuse_unusable
    from sweeper.cli.watching import Caller
    from sweeper.controller import refuse_if_changed
    from sweeper.store import open_store

    here = how.launcher == "local" and not how.detached  # workers elsewhere see for themselves
    if here and any(spec.faults.checkpoint_every for spec in specs):
        refuse_unusable(settings.checkpoints)
    launchers = [how.open_launcher(spec, settings) for spec in specs]
    caller = Caller()  # so that Ctrl-C is heard while a database hangs
    opened = caller.ask(lambda: open_store(settings.store_url))
    caller.ask(lambda: refuse_if_changed(opened, specs, extend=how.extend))
    for index, (spec, launcher) in enumerate(zip(specs, launchers, strict=True)):
        if how.detached:
            yield _detach(spec, settings, how, opened, launcher)
        elif index and time.monotonic() > how.until:
            sys.stderr.write(f"{spec.name}: not begun, {_TIME_IS_UP}\n")
        else:
            yield _run(spec, settings, how, opened, launcher, caller)


def _dry_run(specs: list[StudySpec], *, reference: bool, json_: bool) -> None:
    from sweeper.cli.planning import print_plan, public, summary_line, survey, total_line
    from sweeper.cli.printing import print_json

    surveys = (survey(spec, with_reference=reference) for spec in specs)
    if json_:
        found = [public(surveyed) for surveyed in surveys]
        print_json(found[0] if len(found) == 1 else found)
    elif len(specs) == 1:
        print_plan(next(surveys))
    else:
        done = []
        for surveyed in surveys:  # timing a model takes seconds: each is shown as it is known
            sys.stdout.write(summary_line(surveyed) + "\n")
            sys.stdout.flush()
            done.append(surveyed)
        sys.stdout.write(total_line(done) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class _How:
    """What was typed beside the study file. ``until``: when the time is up, monotonic seconds."""

    launcher: LauncherName
    workers: int | None
    reference: bool
    extend: bool
    detached: bool
    until: float

    def open_launcher(self, spec: StudySpec, settings: Settings) -> Launcher:
        """The launcher, where its workers can reach the store and MLflow."""
        from sweeper.controller import refuse_if_out_of_reach
        from sweeper.launchers import Group, open_launcher

        group = Group(
            name=group_name(settings.store_url, spec.name),
            logs=settings.logs(spec.name),
            resources=spec.resources,
            grace_s=spec.faults.grace_s,
            detached=self.detached,
        )
        opened = open_launcher(self.launcher, group)
        refuse_if_out_of_reach(settings, opened)
        return opened

    def sweep(
        self, opened: Store, prepared: Prepared, settings: Settings, launcher: Launcher
    ) -> Sweep:
        """The study with as many workers as were asked for, or as there is room for."""
        from sweeper.controller import Sweep

        resources = prepared.study.spec.resources
        wanted = self.workers or resources.workers
        count = launcher.fitting(resources.gpus_per_worker) if wanted == "auto" else int(wanted)
        return Sweep(
            store=opened,
            settings=settings,
            study=prepared.study,
            launcher=launcher,
            workers=count,
            allow_imports=True,  # its spec came from a file of the person who typed this
        )


def _detach(
    spec: StudySpec, settings: Settings, how: _How, opened: Store, launcher: Launcher
) -> dict[str, Any]:
    """Enqueue a study's trials, and start the workers that outlive this process."""
    from sweeper.controller import prepare

    prepared = prepare(opened, spec, with_reference=how.reference, extend=how.extend)
    sys.stderr.write(f"{spec.name}: {prepared.enqueued} trials are waiting for workers\n")
    workers = 0
    if how.launcher != "local":
        sweep = how.sweep(opened, prepared, settings, launcher)
        sweep.start()
        workers = len(sweep.alive)
        sys.stderr.write(f"{spec.name}: {workers} workers on {launcher.name}\n")
    return {"study": spec.name, "enqueued": prepared.enqueued, "workers": workers}


def _run(
    spec: StudySpec,
    settings: Settings,
    how: _How,
    opened: Store,
    launcher: Launcher,
    caller: Caller,
) -> dict[str, Any]:
    """One study, from its spec to its result."""
    from sweeper.cli.view import view
    from sweeper.cli.watching import Interrupts, leave, say_interrupted, watch
    from sweeper.controller import prepare
    from sweeper.service.finish import Ahead
    from sweeper.store import progress, standing, studies
    from sweeper.tracking import TrackingService

    began = time.monotonic()
    prepared = caller.ask(
        lambda: prepare(opened, spec, with_reference=how.reference, extend=how.extend)
    )
    if not prepared.new:
        sys.stderr.write(f"{spec.name}: resumed, {prepared.enqueued} trials added\n")
    ahead = Ahead()
    with TrackingService(settings) as service:
        sweep = how.sweep(opened, prepared, settings, launcher)
        with Interrupts() as interrupts:
            try:
                with view(lambda: service.uri) as shown:
                    watch(
                        sweep,
                        caller,
                        interrupts,
                        shown,
                        service,
                        until=how.until,
                        nearly_over=ahead.start,
                    )
            finally:
                leave(sweep, caller)
            if interrupts.count:
                say_interrupted(sweep, caller)
                raise typer.Exit(130)
        ahead.wait()
        study = studies.load(opened, spec.name)  # its budget may have grown meanwhile
        if progress(opened, study).over:
            sweep.clean_up()
        report = _publish(opened, study, settings, service)
        experiment_id = service.experiment_id(spec.name)
    now = standing(opened, study)
    result = _result(now, settings, experiment_id, time.monotonic() - began)
    early = sweep.enough or (_TIME_IS_UP if sweep.stopping and not now.over else "")
    result["report"] = str(report) if report else None
    result["stopped"] = early or None
    _say_result(now, settings, report, early)
    return result


def _publish(
    opened: Store, study: StoredStudy, settings: Settings, service: TrackingService
) -> Path | None:
    """Finish the study, and say what of it went wrong; where the page is, or None."""
    from sweeper.cli.reporting import saying
    from sweeper.service.finish import Finishing
    from sweeper.store import progress, studies

    with saying() as say, opened.alone(study.id, timeout_s=_OTHERS_S):
        finishing = Finishing(
            store=opened,
            settings=settings,
            service=service,
            say=say,
            warn=lambda text: sys.stderr.write(plain(f"sweeper: {text}\n")),
            allow_imports=True,  # its spec came from a file of the person who typed this
        )
        finished = finishing.finish(study)
        if not finished.problem:
            studies.remember_finished(opened, study.id, progress(opened, study).counts)
    return finished.page


def _result(
    now: Standing, settings: Settings, experiment_id: str | None, seconds: float
) -> dict[str, Any]:
    """What ``launch --json`` prints."""
    best = now.best
    return {
        "study": now.spec.name,
        "trials": now.counts,
        "best": None
        if best is None
        else {
            "number": best.number,
            "params": dict(best.params),
            "metrics": dict(best.metrics),
            "values": list(best.values),
        },
        "tracking_uri": masked(settings.tracking_uri or settings.embedded_tracking_uri),
        "experiment_id": experiment_id,
        "seconds": round(seconds, 3),
    }


def _say_result(now: Standing, settings: Settings, report: Path | None, early: str) -> None:
    from sweeper.cli.printing import err, number, text

    console = err()
    counts = ", ".join(f"{count} {state}" for state, count in now.counts.items() if count)
    console.print(f"\n[bold]{now.spec.name}[/]: {counts}")
    if early:
        console.print(f"no further trial was begun: {early}", markup=False)
    best = now.best
    if report is not None:
        console.print(f"report: {report}", markup=False)
    if best is None:
        failed = next((row.error for row in now.rows if row.error), None)
        reason = "" if failed is None else ": " + failed.strip().splitlines()[-1]
        console.print("no trial completed" + reason, markup=False)
        return
    metric = now.spec.objective[0].metric
    line = f"best: trial {best.number}, {metric} {number(best.values[0])}"
    if "test_accuracy" in best.metrics:
        line += f", test accuracy {number(best.metrics['test_accuracy'])}"
    console.print(line, style="green")
    for path, value in best.params.items():
        console.print(f"  {text(path)} = {text(value)}")
    where = masked(settings.tracking_uri) if settings.tracking_uri else "run: sweeper ui"
    console.print(f"compare the runs in MLflow ({where})", markup=False)

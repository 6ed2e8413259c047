"""The end of a study: MLflow gets what it lacks, the report is written and published.

What ``sweeper launch`` and ``sweeper controller`` do alike, each under the study's own lock
(:meth:`sweeper.store.Store.alone`). Doing it again is harmless.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sweeper.errors import TrackerUnreachableError
from sweeper.provenance import command
from sweeper.service.agreement import lagging, settle
from sweeper.settings import Settings
from sweeper.store import Store, StoredStudy, standing
from sweeper.tracking import TrackingService
from sweeper.tracking.journal import refused
from sweeper.tracking.mlflow import load as load_mlflow

if TYPE_CHECKING:
    from sweeper.report.collect import StudyData
    from sweeper.report.write import Report

Say = Callable[[str], None]

_LATER: Final = (
    "sweeper.report.study_page",
    "sweeper.report.curves",
    "sweeper.report.factors",
    "sweeper.report.figures",
    "sweeper.report.mistakes",
    "sweeper.report.pictures",
    "sweeper.report.publish",
    "sweeper.report.timeline",
    "sweeper.report.write",
    "mlflow.pyfunc",
    "mlflow.pytorch",
    "optuna.importance",
    "plotly.io",
    "torch._functorch.partitioners",
    "torch.export",
)
"""What a report and its publication load when they get there: torch and its export, plotly, scikit-
learn for Optuna's importances, MLflow's models."""

_TEST_S: Final = 10.0
"""For what the best model gets wrong; `sweeper report` takes the time it needs."""


class Ahead:
    """Loads what finishing a study will need, in a thread of its own, while the last trials train.

    Seconds that nobody has to wait for then. What cannot be loaded is told by whoever needs it. The
    thread is not a daemon: a process must not end within an import.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread = threading.Thread(target=self._load, name="load ahead")
        self._thread.start()

    def wait(self) -> None:
        """Wait until all is loaded. Nobody may import any of it before: MLflow imports in circles,
        and a second thread would be given modules that are not complete."""
        if self._thread is not None:
            self._thread.join()

    def _load(self) -> None:
        with contextlib.suppress(Exception):
            load_mlflow()
        for name in _LATER:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Where the page is, None where it could not be written, and what MLflow kept from being
    told, empty where it has everything."""

    page: Path | None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Finishing:
    """How a study is finished. ``say`` hears of the steps, ``warn`` of what goes wrong.

    ``allow_imports``: the best model may be one of the study's own. ``patience_s`` is for workers
    that have ended the last trial and are still sending what they measured.
    """

    store: Store
    settings: Settings
    service: TrackingService
    say: Say
    warn: Callable[[str], object]
    allow_imports: bool = False
    patience_s: float = 0.0

    def finish(self, study: StoredStudy) -> Finished:
        """Send what is left to MLflow, write the report, and hang it on the study's own run.

        A tracker that is out of reach costs neither the trials, nor the report, nor what is in the
        spool. Raises StoreUnreachableError.
        """
        from sweeper.report.publish import publish

        written: tuple[StudyData, Report] | None = None
        problem = ""
        try:
            try:
                sent = self.service.replay()
                if sent.problem:
                    raise TrackerUnreachableError(sent.problem)
                self._wait_for_runs(study)
                settle(standing(self.store, study), self.settings)
            finally:
                written = self._report(study)
            if written is not None:
                publish(*written, self.settings, self.service.wait())
        except TrackerUnreachableError as error:
            problem = str(error)
            self.warn(f"{problem}\nWhat MLflow lacks is kept; send it: sweeper sync")
        for found in refused(self.settings.spool):
            if study.name in found.experiments:
                self.warn(found.told())
        return Finished(page=written[1].page if written else None, problem=problem)

    def _wait_for_runs(self, study: StoredStudy) -> None:
        until = time.monotonic() + self.patience_s
        now = standing(self.store, study)
        while time.monotonic() < until and lagging(now, self.settings):
            time.sleep(1.0)

    def _report(self, study: StoredStudy) -> tuple[StudyData, Report] | None:
        """Write the report; None where that went wrong, which is said."""
        from sweeper.report.collect import collect
        from sweeper.report.write import write_report

        try:
            data = collect(
                self.store,
                study,
                self.settings,
                command=command(),
                allow_imports=self.allow_imports,
                say=self.say,
            )
            return data, write_report(data, self.settings, limit_s=_TEST_S, say=self.say)
        except Exception as error:  # noqa: BLE001 - the trials are done: no report may undo that
            self.warn(f"the report could not be written: {type(error).__name__}: {error}")
            return None

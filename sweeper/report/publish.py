"""What hangs on a study's own MLflow run: spec, report, tables, and the best model."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper import settings as names
from sweeper.errors import SweeperError, TrackerUnreachableError
from sweeper.measurement import FINAL_METRICS
from sweeper.provenance import command, commit, versions
from sweeper.report.collect import StudyData
from sweeper.report.tables import markdown
from sweeper.report.write import Report
from sweeper.settings import Settings
from sweeper.store import Standing
from sweeper.tracking import RunStart, SpoolTracker

if TYPE_CHECKING:
    from sweeper.report.model import BestModel

_log = logging.getLogger(__name__)


def publish(data: StudyData, report: Report, settings: Settings, tracking_uri: str) -> None:
    """Write the study's own run with the report's files, and log the best model.

    Through the spool: a server that does not take it now gets it with the next ``sweeper sync``.
    Raises TrackerUnreachableError then.
    """
    key = names.study_run_key(data.name)
    now = data.now
    with SpoolTracker(settings.spool, tracking_uri) as tracker:
        tracker.start(
            RunStart(
                key=key,
                experiment=data.name,
                name=data.name,
                start_time_ms=round(time.time() * 1000),
                params={
                    "sampler": now.spec.search.sampler.name,
                    "pruner": now.spec.search.pruner.name,
                },
                tags=_tags(data),
                owner=now.owner,
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            spec = Path(folder) / "spec.json"
            spec.write_text(
                now.spec.model_dump_json(indent=2, exclude_unset=True), encoding="utf-8"
            )
            tracker.artifact(key, spec)
        for file in report.files:
            tracker.artifact(key, file)
        tracker.end(
            key,
            status="FINISHED",
            end_time_ms=round(time.time() * 1000),
            tags=_result_tags(now),
        )
        if tracker.flush(60.0):
            raise TrackerUnreachableError(tracker.problem or "MLflow must take the report in 60 s")
    if report.model is not None:
        _log_best_model(data, report.model, tracking_uri)


def _tags(data: StudyData) -> dict[str, str]:
    tags = {
        names.STUDY_TAG: data.name,
        names.ROLE_TAG: names.ROLE_STUDY,
        "sweeper.command": command(),
        "mlflow.note.content": markdown(data.now.spec.description),
        **{f"sweeper.version.{name}": version for name, version in versions().items()},
    }
    if found := commit():
        tags[names.COMMIT_TAG] = found
    return tags


def _result_tags(now: Standing) -> dict[str, str]:
    """How the study stands. Tags, not metrics: those would be charts among the trials' own, and
    keep their first value when the study is extended."""
    counts = ", ".join(f"{count} {state}" for state, count in now.counts.items() if count)
    tags = {"sweeper.trials": counts, "sweeper.best_trial": "none"}
    if now.best is not None:
        shown: dict[str, float] = {now.spec.objective[0].metric: now.best.values[0]}
        shown |= {
            name: now.best.metrics[name] for name in FINAL_METRICS.keys() & now.best.metrics.keys()
        }
        tags["sweeper.best_trial"] = str(now.best.number)
        tags |= {f"sweeper.best.{name}": f"{value:.6g}" for name, value in shown.items()}
    return tags


def _log_best_model(data: StudyData, model: BestModel, tracking_uri: str) -> None:
    """Log the model, with signature and input example, on its trial's run, and register it."""
    from sweeper.tracking import mlflow
    from sweeper.tracking.model import log_model

    module, example = model.deployable()
    try:
        client = mlflow.connect(tracking_uri)
        log_model(client, model.weights.run_id, module, example, registered_name=data.name)
    except SweeperError as error:
        _log.warning("the best model is not logged, MLflow says: %s", error)

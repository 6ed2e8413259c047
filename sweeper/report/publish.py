"""What hangs on a study's own MLflow run: spec, table, figures, and the best model."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sweeper import settings as names
from sweeper.errors import DataNotFoundError, OutOfReachError
from sweeper.provenance import command, commit, versions
from sweeper.report.model import deployable
from sweeper.settings import Settings
from sweeper.store import Standing, Store, StoredStudy, TrialRow, standing
from sweeper.tracking import RunStart, SpoolTracker

_log = logging.getLogger(__name__)


def publish(store: Store, study: StoredStudy, settings: Settings, tracking_uri: str) -> None:
    """Write the study's own run, and log the best model where its data are at hand.

    Through the spool: a server that does not answer now gets it with the next ``sweeper sync``.
    """
    now = standing(store, study)
    key = names.study_run_key(study.name)
    # Drawn before the tracker's thread loads MLflow: Plotly trips over a half-loaded pandas.
    documents = _documents(study, now)
    with SpoolTracker(settings.spool, tracking_uri) as tracker:
        tracker.start(
            RunStart(
                key=key,
                experiment=study.name,
                name=study.name,
                start_time_ms=round(time.time() * 1000),
                params={
                    "sampler": study.spec.search.sampler.name,
                    "pruner": study.spec.search.pruner.name,
                },
                tags=_tags(study),
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            for file, text in documents.items():
                written = Path(folder) / file
                written.write_text(text, encoding="utf-8")
                tracker.artifact(key, written)
        tracker.end(
            key,
            status="FINISHED",
            end_time_ms=round(time.time() * 1000),
            metrics=_metrics(now),
            tags={"sweeper.best_trial": str(now.best.number) if now.best else "none"},
        )
        tracker.flush(60.0)
    if now.best is not None:
        _log_best_model(study, now.best, settings, tracking_uri)


def _tags(study: StoredStudy) -> dict[str, str]:
    tags = {
        names.STUDY_TAG: study.name,
        names.ROLE_TAG: names.ROLE_STUDY,
        "sweeper.command": command(),
        "mlflow.note.content": study.spec.description,
        **{f"sweeper.version.{name}": version for name, version in versions().items()},
    }
    if found := commit():
        tags[names.COMMIT_TAG] = found
    return tags


def _documents(study: StoredStudy, now: Standing) -> Mapping[str, str]:
    """File name → text of everything that belongs to the study as a whole."""
    from sweeper.report.figures import figures, page
    from sweeper.report.tables import trials_csv

    documents = {
        "spec.json": study.spec.model_dump_json(indent=2, exclude_unset=True),
        "trials.csv": trials_csv(now),
    }
    if drawn := figures(study.study):
        documents["figures.html"] = page(drawn, study.name)
    return documents


def _metrics(now: Standing) -> dict[str, float]:
    found = {f"trials_{state}": float(count) for state, count in now.counts.items()}
    if now.best is not None:
        found |= {f"best_{name}": value for name, value in now.best.metrics.items()}
    return found


def _log_best_model(
    study: StoredStudy, best: TrialRow, settings: Settings, tracking_uri: str
) -> None:
    """Log the best trial's model, with signature and input example, on its run, and register it.

    Its weights come from the run as well. Data that are not on this machine, or weights that a
    lost worker took with it, cost the model and no more.
    """
    from sweeper.tracking import mlflow
    from sweeper.tracking.model import log_model

    try:
        client = mlflow.connect(tracking_uri)
        run_id = mlflow.run_ids(client, study.name).get(names.run_key(study.name, best.origin))
        if run_id is None:
            _log.warning("the run of trial %d is not in MLflow; no model logged", best.number)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = f"{names.WEIGHTS_FOLDER}/{names.WEIGHTS_FILE}"
            file = mlflow.download_artifact(client, run_id, path, Path(folder))
            module, example = deployable(study, best, settings, file)
        log_model(client, run_id, module, example, registered_name=study.name)
    except DataNotFoundError as error:
        _log.warning("the best model is not logged: %s", error)
    except OutOfReachError as error:
        _log.warning("the best model is not logged, MLflow says: %s", error)

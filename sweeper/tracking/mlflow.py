"""MLflow, spoken to with explicit run ids: the one module of sweeper that knows its client.

Nothing here touches MLflow's global run or tracking address, so several trials of one process
cannot get in each other's way. MLflow is imported inside the functions: it takes over a second.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from sweeper.errors import TrackerRefusedError, TrackerUnreachableError
from sweeper.settings import ANYBODY, RUN_KEY_TAG, STUDY_ID_TAG, Owner, masked
from sweeper.tracking.batch import Batch, fitting_name, fitting_param, fitting_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_MAX_DIGEST: Final = 36
_OLDEST: Final = 100

_QUIET: Final[Mapping[str, str]] = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the spool repeats; by default a call blocks 247 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_CONFIGURE_LOGGING": "false",
}
_TRAINING: Final = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's pages show runs and models rather than prompts and traces."""
_ASKED_TAG: Final = "sweeper.asked"
"""Of an experiment: when the server was last asked whether it is well."""

_LATER: Final = frozenset(
    {
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED",
        "ABORTED",
        "CANCELLED",
        "UNAUTHENTICATED",
        "CUSTOMER_UNAUTHORIZED",
        "PERMISSION_DENIED",
        "ENDPOINT_NOT_FOUND",
    }
)


class ServerFailedError(TrackerUnreachableError):
    """The MLflow server answers that it failed: at one record each time while it is well otherwise,
    and it is the record's fault; else the server's, which may be well later."""


def load() -> None:
    """Import MLflow, which takes 2 s, with few retries and a quiet console."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    import mlflow.tracking  # noqa: F401 - for the time that it takes


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the server (http) or database (sqlite, postgresql) at ``tracking_uri``.

    Sets MLflow's own environment variables for few retries and a quiet console, unless they are
    set. An http client is made without a call, so the server need not be up.
    """
    load()
    if urlsplit(tracking_uri).hostname in {"127.0.0.1", "localhost"}:
        _no_proxy_for("127.0.0.1,localhost")
    from mlflow import MlflowClient

    for name, level in (("mlflow", logging.ERROR), ("alembic", logging.WARNING)):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(level)
    if not tracking_uri.startswith("http"):  # MLflow's own query, under SQLAlchemy 2.1
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning)
    with translated(f"open {masked(tracking_uri)}"):
        return MlflowClient(tracking_uri)


def _no_proxy_for(hosts: str) -> None:
    """Our own server is on this machine: a proxy of the network must not be asked for it."""
    for variable in ("no_proxy", "NO_PROXY"):
        known = os.environ.get(variable, "")
        if "127.0.0.1" not in known and known != "*":
            os.environ[variable] = f"{known},{hosts}".strip(",")


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the experiment ``name``, which is created, or restored if it was deleted.

    Several processes may ask at once: the one that comes second takes what the first created.
    """
    from mlflow.exceptions import MlflowException

    with translated(f"look for the experiment {name!r}"):
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, tags=dict(_TRAINING)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)
        if found is None:
            raise TrackerUnreachableError(
                f"MLflow has the experiment {name!r} and does not show it"
            )
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def write_and_read(client: MlflowClient, experiment: str) -> None:
    """Change the experiment of that id a little and read it: whether the server does either."""
    with translated("write a tag of the experiment and read it"):
        client.set_experiment_tag(experiment, _ASKED_TAG, str(time.time_ns()))
        client.get_experiment(experiment)


def find_run(client: MlflowClient, experiment: str, key: str, owner: Owner = ANYBODY) -> Run | None:
    """The owner's run with this key in the experiment of that id; the oldest, were there several.

    One that only an older version can have begun is taken where none has the owner's tag. One call,
    but where others have as many runs of that key as MLflow gives at once.
    """
    if "'" in key:
        raise ValueError(f"a run's key must not contain a quote, but got {key!r}")
    where = f"tags.`{RUN_KEY_TAG}` = '{key}'"
    with translated(f"look for the run {key}"):
        runs = _oldest(client, experiment, where)
        own = [run for run in runs if run.data.tags.get(STUDY_ID_TAG) == owner.identity]
        if owner.identity and not own and len(runs) == _OLDEST:
            own_where = f"{where} AND tags.`{STUDY_ID_TAG}` = '{owner.identity}'"
            own = _oldest(client, experiment, own_where)
    return next((run for run in (*own, *runs) if _is_of(owner, run)), None)


def _oldest(client: MlflowClient, experiment: str, where: str) -> list[Run]:
    return list(
        client.search_runs(
            [experiment],
            filter_string=where,
            order_by=["attributes.start_time ASC"],
            max_results=_OLDEST,
        )
    )


def _is_of(owner: Owner, run: Run) -> bool:
    return owner.has(str(run.info.run_id), run.data.tags, run.info.start_time or 0)


def create_run(
    client: MlflowClient, experiment: str, *, name: str, start_time_ms: int, tags: Mapping[str, str]
) -> str:
    """The id of a new run in the experiment of that id; asked twice, MLflow creates two."""
    with translated(f"create the run {name}"):
        run = client.create_run(
            experiment,
            start_time=start_time_ms,
            run_name=name,
            tags={fitting_name(key): fitting_tag(value) for key, value in tags.items()},
        )
    return str(run.info.run_id)


def set_status(
    client: MlflowClient, run_id: str, status: str, *, end_time_ms: int | None = None
) -> None:
    """RUNNING, or an end status with its time."""
    with translated(f"set the run {run_id} to {status}"):
        if end_time_ms is None:
            client.update_run(run_id, status=status)
        else:
            client.set_terminated(run_id, status=status, end_time=end_time_ms)


def log_batch(client: MlflowClient, run_id: str, batch: Batch) -> None:
    """Send a batch of at most 1,000 metrics, 100 parameters and 100 tags."""
    from mlflow.entities import Metric, Param, RunTag

    with translated(f"log to the run {run_id}"):
        client.log_batch(
            run_id,
            metrics=[
                Metric(fitting_name(p.name), p.value, p.time_ms, p.step) for p in batch.metrics
            ],
            params=[Param(fitting_name(k), fitting_param(v)) for k, v in batch.params.items()],
            tags=[RunTag(fitting_name(k), fitting_tag(v)) for k, v in batch.tags.items()],
            synchronous=True,
        )


def log_dataset(client: MlflowClient, run_id: str, dataset: Mapping[str, Any]) -> None:
    """Name a data set as an input of the run; see :meth:`Tracker.note` for its fields."""
    named = {"name", "digest", "source", "context", "schema", "profile"}
    profile = dataset.get("profile") or {k: v for k, v in dataset.items() if k not in named}
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = str(dataset.get("source", ""))
    remote = urlsplit(source).scheme in {"http", "https"}
    entity = Dataset(
        name=str(dataset["name"]),
        digest=str(dataset.get("digest", ""))[:_MAX_DIGEST],
        source_type="http" if remote else "local",
        source=json.dumps({"url" if remote else "uri": source}),
        schema=_json(dataset.get("schema")),
        profile=_json(profile),
    )
    context = InputTag("mlflow.data.context", str(dataset.get("context", "training")))
    with translated(f"name the data set of the run {run_id}"):
        client.log_inputs(run_id, [DatasetInput(entity, [context])])


def log_artifact(client: MlflowClient, run_id: str, file: Path, folder: str) -> None:
    """Store a file with the run; one of the same name is replaced."""
    with translated(f"store {file.name} with the run {run_id}"):
        client.log_artifact(run_id, str(file), folder or None)


def steps_of(client: MlflowClient, run_id: str, metric: str) -> set[int]:
    """The steps at which the run has a value of the metric."""
    with translated(f"read {metric} of the run {run_id}"):
        return {point.step for point in client.get_metric_history(run_id, fitting_name(metric))}


def get_run(client: MlflowClient, run_id: str) -> Run:
    """The run of that id, with its tags, parameters and latest metrics."""
    with translated(f"read the run {run_id}"):
        return client.get_run(run_id)


def list_runs(
    client: MlflowClient, experiment: str, where: str = "", owner: Owner = ANYBODY
) -> list[Run]:
    """The owner's runs in the experiment of that *name*, the oldest first; one call for 1,000 runs.

    ``where`` is MLflow's filter.
    """
    runs: list[Run] = []
    with translated(f"list the runs of {experiment!r}"):
        found = client.get_experiment_by_name(experiment)
        token: str | None = None
        while found is not None:
            page = client.search_runs(
                [found.experiment_id],
                filter_string=where,
                order_by=["attributes.start_time ASC"],
                max_results=1000,
                page_token=token,
            )
            runs += (run for run in page if _is_of(owner, run))
            token = page.token
            if not token:
                break
    return runs


def runs_by_key(client: MlflowClient, experiment: str, owner: Owner = ANYBODY) -> dict[str, Run]:
    """Key to run of the owner's runs in the experiment of that *name*; of several with one key the
    oldest that has the owner's tag.

    One call for 1,000 runs.
    """
    result: dict[str, Run] = {}
    found = list_runs(client, experiment, owner=owner)
    for run in sorted(found, key=lambda run: STUDY_ID_TAG not in run.data.tags):
        if RUN_KEY_TAG in run.data.tags:
            result.setdefault(run.data.tags[RUN_KEY_TAG], run)
    return result


def run_ids(client: MlflowClient, experiment: str, owner: Owner = ANYBODY) -> dict[str, str]:
    """Key to run id of what :func:`runs_by_key` finds."""
    runs = runs_by_key(client, experiment, owner)
    return {key: str(run.info.run_id) for key, run in runs.items()}


def download_artifact(client: MlflowClient, run_id: str, path: str, folder: Path) -> Path:
    """Copy an artifact of the run into ``folder``; where it is now."""
    folder.mkdir(parents=True, exist_ok=True)
    with translated(f"fetch {path} of the run {run_id}"):
        return Path(client.download_artifacts(run_id, path, str(folder)))


def run_address(tracking_uri: str, experiment: str, run_id: str | None = None) -> str | None:
    """Where a browser shows the experiment of that id, or one run of it; None without a server."""
    if urlsplit(tracking_uri).scheme not in {"http", "https"}:
        return None
    address = urlsplit(tracking_uri)
    bare = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()  # without a login
    page = f"{bare.rstrip('/')}/#/experiments/{experiment}/runs"
    return f"{page}{'/' + run_id if run_id else ''}?workflowType=machine_learning"


def _json(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def translated(action: str) -> Iterator[None]:
    """MLflow's errors as ours. Raises TrackerUnreachableError for what may go well later, its
    subclass ServerFailedError for an error inside the server, TrackerRefusedError for good."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise _ours(error, f"could not {action}: {_brief(error)}") from error
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise TrackerRefusedError(f"could not {action}: {_brief(error)}") from error
    except OSError as error:  # MLflow raises it bare for an artifact that is not there
        if error.errno is None and not isinstance(error, requests.RequestException):
            raise TrackerRefusedError(f"could not {action}: {_brief(error)}") from error
        raise TrackerUnreachableError(f"could not {action}: {_brief(error)}") from error


def _ours(
    error: Any, message: str
) -> TrackerUnreachableError | TrackerRefusedError | ServerFailedError:
    import requests

    text = str(error)
    cause = error.__cause__ or error.__context__
    if isinstance(cause, requests.RequestException):  # MLflow drops the cause, Python keeps it
        failed = isinstance(cause, requests.exceptions.RetryError) and "too many 500" in text
        return ServerFailedError(message) if failed else TrackerUnreachableError(message)
    code = error.error_code
    if code in _LATER or "QueuePool limit" in text or "database is locked" in text:
        return TrackerUnreachableError(message)
    if code in {"INTERNAL_ERROR", "BAD_REQUEST"}:  # BAD_REQUEST is any other error of the database
        return ServerFailedError(message)
    return TrackerRefusedError(message)


def _brief(error: BaseException) -> str:
    """The first line of an error, which MLflow's may have forty of."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:400]

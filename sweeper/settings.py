"""Where everything lives, and what it is called: the one place for names and paths.

The order is: flag, then environment, then default. Nobody else builds or parses these names.

===================== =========================================================================
``SWEEPER_HOME``      folder of the embedded databases, artifacts, spool and logs (``.sweeper``)
``SWEEPER_STORE``     SQLAlchemy URL of the Optuna database (SQLite in the home folder)
``SWEEPER_DATA``      folder of the data sets (``~/.cache/sweeper/data``)
``SWEEPER_CHECKPOINTS`` folder or fsspec URL of the checkpoints (``checkpoints`` in the home folder)
``SWEEPER_STORE_FILE`` a file that holds the URL of the store, for a secret that is a file
``SWEEPER_WORKER``    name of this worker (host and process id)
``SWEEPER_LAUNCHER``  who started this worker: local, ray, slurm, kubernetes, compose (``-``)
``MLFLOW_TRACKING_URI`` MLflow server (one is started on 127.0.0.1)
===================== =========================================================================
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from sweeper.address import host_of, store_address
from sweeper.errors import UsageError
from sweeper.private import redacted, there

WORKER_VARIABLE: Final = "SWEEPER_WORKER"
LAUNCHER_VARIABLE: Final = "SWEEPER_LAUNCHER"

_LOGINS: Final = (
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("MLFLOW_TRACKING_INSECURE_TLS", "PGPASSWORD", "PGSSLMODE"),
)
"""What servers ask for, by MLflow's and PostgreSQL's own names. Names of files are not among them:
they need not be the same on another machine."""

_SECRETS: Final = ("password", "sslpassword")
"""Parameters of PostgreSQL that are for nobody to see."""

RUN_KEY_TAG: Final = "sweeper.key"
STUDY_TAG: Final = "sweeper.study"
STUDY_ID_TAG: Final = "sweeper.study_id"
ROLE_TAG: Final = "sweeper.role"
TRIAL_TAG: Final = "sweeper.trial"
STATE_TAG: Final = "sweeper.state"
ATTEMPT_TAG: Final = "sweeper.attempt"
WORKER_TAG: Final = "sweeper.worker"
COHORT_TAG: Final = "sweeper.cohort"
COMPANY_TAG: Final = "sweeper.company"
OUTCOME_TAG: Final = "sweeper.outcome"
RESUMED_TAG: Final = "sweeper.resumed"
STARTED_TAG: Final = "sweeper.started"
NONFINITE_TAG: Final = "sweeper.nonfinite"
COMMIT_TAG: Final = "mlflow.source.git.commit"

WEIGHTS_FILE: Final = "weights.safetensors"
WEIGHTS_FOLDER: Final = "weights"

CLOCKS_MS: Final = 60_000
"""So much may the clocks of two machines differ."""

ROLE_TRIAL: Final = "trial"
ROLE_STUDY: Final = "study"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The resolved settings of one process. All paths are absolute.

    ``checkpoints`` is a folder, or an fsspec URL such as ``s3://bucket/folder``.
    """

    home: Path
    data: Path
    store_url: str
    tracking_uri: str | None
    checkpoints: str

    @classmethod
    def resolve(
        cls,
        *,
        home: str | Path | None = None,
        store: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Settings from flags (not None), then the environment, then defaults.

        Raises UsageError where the store's URL cannot be one, or a folder cannot be.
        """
        env = os.environ if environment is None else environment
        home_path = _expanded("SWEEPER_HOME", home or env.get("SWEEPER_HOME") or ".sweeper")
        if not (found := there(home_path)).is_dir():
            raise UsageError(f"the home folder must be a folder, but {found} is none: {home_path}")
        data = env.get("SWEEPER_DATA") or "~/.cache/sweeper/data"
        store = store or env.get("SWEEPER_STORE") or _content(env.get("SWEEPER_STORE_FILE"))
        if store:
            store_address(store)
        return cls(
            home=home_path,
            data=_expanded("SWEEPER_DATA", data),
            store_url=store or sqlite_url(home_path / "optuna.db"),
            tracking_uri=env.get("MLFLOW_TRACKING_URI") or None,
            checkpoints=_place(env.get("SWEEPER_CHECKPOINTS") or home_path / "checkpoints"),
        )

    @property
    def on_postgres(self) -> bool:
        """Whether the store is a database on a PostgreSQL server."""
        return make_url(self.store_url).get_backend_name() == "postgresql"

    @property
    def embedded_tracking_uri(self) -> str:
        """The database of the MLflow server that sweeper starts itself; clients can open it too.

        A file of the home folder, or beside a PostgreSQL store a second database on its server.
        """
        if not self.on_postgres:
            return sqlite_url(self.home / "mlflow.db")
        store = make_url(self.store_url)
        beside = store.set(drivername="postgresql+psycopg", database=f"{store.database}_mlflow")
        return beside.render_as_string(hide_password=False)

    @property
    def artifacts(self) -> Path:
        return self.home / "artifacts"

    @property
    def spool(self) -> Path:
        return self.home / "spool"

    @property
    def server_file(self) -> Path:
        """Process and port of the MLflow server that sweeper started for this home folder."""
        return self.home / "server.json"

    @property
    def server_log(self) -> Path:
        return self.home / "mlflow.log"  # not in logs, where folders have the studies' names

    @property
    def reports(self) -> Path:
        return self.home / "reports"

    @property
    def cohort_sizes(self) -> Path:
        """How many trials at once were measured to be the fastest, by structure and device."""
        return self.home / "cohorts.json"

    @property
    def prepared(self) -> Path:
        """Data sets as trials use them, which the workers of a machine share."""
        return prepared_folder(self.data)

    @property
    def compile_gains(self) -> Path:
        """What ``torch.compile`` gave and cost, by program and device."""
        return self.home / "compiled.json"

    @property
    def compiled_code(self) -> Path:
        """What ``torch.compile`` made, shared by the workers of this home folder."""
        return self.home / "compiled"

    def logs(self, study: str) -> Path:
        """The folder of the worker logs of a study."""
        return self.home / "logs" / study

    def environment(self) -> dict[str, str]:
        """The variables that give a child process these settings."""
        variables = {
            "SWEEPER_HOME": str(self.home),
            "SWEEPER_DATA": str(self.data),
            "SWEEPER_STORE": self.store_url,
            "SWEEPER_CHECKPOINTS": self.checkpoints,
        }
        if self.tracking_uri:
            variables["MLFLOW_TRACKING_URI"] = self.tracking_uri
        return variables


def login_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The logins of this process, for a worker on another machine. Never to be shown or stored."""
    env = os.environ if environment is None else environment
    return {name: env[name] for name in _LOGINS if name in env}


def _expanded(variable: str, path: str | Path) -> Path:
    """``path`` without ``~`` and absolute. Raises UsageError where nobody knows whose ``~`` is."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(
            f"{variable} must be a path from / on, or below the folder of a user who is known "
            f"here, but got {path}"
        ) from error


def _content(file: str | None) -> str | None:
    """What a secret's file holds; None where none is named. Raises UsageError if it is empty."""
    if not file:
        return None
    try:
        text = _expanded("SWEEPER_STORE_FILE", file).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"SWEEPER_STORE_FILE must name a text file, but {file} is not one in UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(
            f"SWEEPER_STORE_FILE must name a file that holds the store's URL, but {file} cannot be "
            f"read: {error.strerror}"
        ) from error
    if not text:
        raise UsageError(f"SWEEPER_STORE_FILE must hold the store's URL, but {file} is empty")
    return text


def _place(where: str | Path) -> str:
    """An fsspec URL as it is, a folder as an absolute path."""
    text = str(where).removeprefix("file://")
    return text if "://" in text else str(_expanded("SWEEPER_CHECKPOINTS", text))


def sqlite_url(file: Path) -> str:
    """The SQLAlchemy URL of a database file; quoted only where its name would be misread."""
    plain = f"sqlite:///{file}"
    if make_url(plain).database == str(file):
        return plain
    return URL.create("sqlite", database=str(file)).render_as_string()


def has_password(url: str) -> bool:
    """Whether ``url`` holds a password, before the host or among its parameters."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        return False
    return bool(parsed.password) or any(name in parsed.query for name in _SECRETS)


def masked(url: str) -> str:
    """``url`` fit for people to see: what is secret in it is replaced by ``***``."""
    try:
        parsed = make_url(url)
        hidden = {name: "***" for name in _SECRETS if name in parsed.query}
        shown = parsed.update_query_dict(hidden)
        shown = shown if shown.password else shown._replace(password=None)
        return redacted(shown.render_as_string(hide_password=True))
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it must not be shown
        return "<unreadable URL>"


def prepared_folder(data: Path) -> Path:
    """Where, in a folder of data sets, they are kept as trials use them."""
    return data / "cache" / "prepared"


def worker_name() -> str:
    """This process's name among the workers of a store: ``SWEEPER_WORKER`` or host and pid."""
    return os.environ.get(WORKER_VARIABLE) or f"{socket.gethostname()}-{os.getpid()}"


def local_worker_name(index: int) -> str:
    """The name of the ``index``-th worker that this process starts on this machine."""
    return f"{socket.gethostname()}-{os.getpid()}-{index}"


def cluster_worker_name(keeper: str) -> str:
    """A new name for a worker that something called ``keeper`` starts on this machine.

    No two workers share one, whatever became of the first: one that was cut off may come back.
    """
    return f"{socket.gethostname()}-{keeper}-{secrets.token_hex(3)}"


def group_name(store_url: str, study: str) -> str:
    """What a cluster calls the workers of a study: no study of another store has the same name.

    The login does not count, so that a new password finds the workers of before.
    """
    url = make_url(store_url)
    place = (url.get_backend_name(), host_of(url), url.port, url.database, study)
    return f"{study}-{hashlib.sha256(repr(place).encode()).hexdigest()[:8]}"


def launcher_name() -> str:
    """Who started this process, as ``SWEEPER_LAUNCHER`` says; ``-`` where nobody does."""
    return os.environ.get(LAUNCHER_VARIABLE) or "-"


def run_name(trial_number: int) -> str:
    """The MLflow run name of a trial, which sorts by number."""
    return f"{trial_number:04d}"


def cohort_name(worker: str, leader: int) -> str:
    """The name of the cohort that the trial numbered ``leader`` began in a worker."""
    return f"{worker}/{run_name(leader)}"


def run_key(study: str, trial_number: int) -> str:
    """The tag value that finds a trial's run again: MLflow itself knows no unique name."""
    return f"{study}/{trial_number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The study that runs belong to: on one MLflow server, studies of several stores may have the
    same name, and so have a later one and an earlier one of the same store.

    ``identity`` is what no other study has, and is a tag of its runs. Older versions wrote none:
    a run without it is this study's if the store names it (``run_ids``), or if it began when the
    study was there (``since_ms``). Without an identity, any run of the study's name will do.
    """

    identity: str = ""
    since_ms: float = math.inf
    run_ids: frozenset[str] = frozenset()

    def has(self, run_id: str, tags: Mapping[str, str], started_ms: int) -> bool:
        """Whether a run is one of the study's."""
        tagged = tags.get(STUDY_ID_TAG, "")
        if tagged or not self.identity:
            return tagged == self.identity or not self.identity
        return run_id in self.run_ids or started_ms >= self.since_ms - CLOCKS_MS


ANYBODY: Final = Owner()


def study_run_key(study: str) -> str:
    """The tag value of the study's own run."""
    return f"{study}/study"

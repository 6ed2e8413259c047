"""The SQL server behind a store: connections, schema, and one lock for all controllers.

Optuna's own tables, Optuna's own storage. What is added is care (design decisions 3 and 4):

* SQLite: WAL, a busy timeout, and ``BEGIN IMMEDIATE``, without which a claim is not atomic.
* PostgreSQL: psycopg 3, connections checked before use, so that a restart costs no error.
* The schema is created by one process at a time.
"""

from __future__ import annotations

import contextlib
import errno
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, make_url

from sweeper.errors import (
    MissingExtraError,
    StoreRefusedError,
    StoreUnreachableError,
    UsageError,
)
from sweeper.settings import masked

_BUSY_TIMEOUT_S: Final = 60
_POSTGRES_LOCK_KEY: Final = 0x73776565  # "swee": the advisory lock that controllers share


class RecentStorage(_CachedStorage):
    """Optuna's cache of finished trials, which may answer from a moment ago where that will do.

    Optuna reads every unfinished trial anew each time it is asked for trials. A pruner asks after
    every epoch; within :meth:`recent` what was read less than ``slack_s`` ago is used again.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._slack_s = 0.0
        self._read_at: dict[int, float] = {}

    @contextlib.contextmanager
    def recent(self, slack_s: float) -> Iterator[None]:
        """Let trials be up to ``slack_s`` old while the context lasts."""
        before, self._slack_s = self._slack_s, slack_s
        try:
            yield
        finally:
            self._slack_s = before

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        now = time.monotonic()
        if now - self._read_at.get(study_id, -math.inf) >= self._slack_s:
            super()._read_trials_from_remote_storage(study_id)
            self._read_at[study_id] = now


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """An open store. ``storage`` caches finished trials; ``backend`` is the database itself."""

    url: URL
    backend: RDBStorage
    storage: RecentStorage

    def close(self) -> None:
        """Give every connection back."""
        self.backend.remove_session()
        self.backend.engine.dispose()

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Hold the store's one lock: what a controller reads in here nobody enqueues against."""
        with reaching(self.url), _server_lock(self.url, self.backend.engine):
            yield


def open_store(url: str) -> Store:
    """Open the store at ``url``, creating its tables if this is the first time.

    Raises:
        UsageError: the URL is not one of SQLite or PostgreSQL.
        MissingExtraError: PostgreSQL without psycopg.
        StoreUnreachableError: the server does not answer, or the file cannot be written.
    """
    address = _address(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with reaching(address), _server_lock(address, None), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = _connect(address)
    return Store(url=address, backend=backend, storage=RecentStorage(backend))


def _address(url: str) -> URL:
    try:
        address = make_url(url)
    except exc.ArgumentError as error:
        raise UsageError(
            "the store must be a URL such as sqlite:///sweeps.db or "
            "postgresql+psycopg://user@host/database, but got something that is not a URL"
        ) from error
    if address.get_backend_name() not in {"sqlite", "postgresql"}:
        raise UsageError(
            f"the store must be SQLite or PostgreSQL, but got {address.drivername!r}; "
            "write sqlite:///… or postgresql+psycopg://…"
        )
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    if address.get_backend_name() == "sqlite" and address.database in {None, "", ":memory:"}:
        raise UsageError(
            "a store must be a file that several processes can open, but got an in-memory "
            "SQLite database; write sqlite:///path/to/file.db"
        )
    return address


def _connect(address: URL) -> RDBStorage:
    url = address.render_as_string(hide_password=False)
    if address.get_backend_name() == "sqlite":
        file = Path(str(address.database))
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        backend = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _BUSY_TIMEOUT_S}})
        event.listen(backend.engine, "connect", _prepare_sqlite)
        event.listen(backend.engine, "begin", _begin_immediate)
        backend.engine.dispose()  # connections made before the listeners
        return backend
    try:
        return RDBStorage(
            url,
            engine_kwargs={
                "pool_pre_ping": True,
                "pool_size": 2,
                "max_overflow": 4,
                "pool_recycle": 600,
            },
        )
    except ImportError as error:
        raise MissingExtraError(
            "PostgreSQL needs psycopg, which is not installed; run: pip install 'sweeper[postgres]'"
        ) from error


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    cursor.close()


def _begin_immediate(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def _server_lock(address: URL, engine: sqlalchemy.Engine | None) -> Iterator[None]:
    """One holder among all processes that use the database: a file lock or an advisory lock."""
    if address.get_backend_name() == "sqlite":
        file = Path(str(address.database)).absolute()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{file}.lock"):
            yield
        return
    own = engine is None
    engine = engine or sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)
    try:
        with engine.connect() as connection:
            lock = {"key": _POSTGRES_LOCK_KEY}
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), lock)
            connection.commit()
            try:
                yield
            finally:
                connection.rollback()
                connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock(:key)"), lock)
                connection.commit()
    finally:
        if own:
            engine.dispose()


@contextlib.contextmanager
def reaching(address: URL | str) -> Iterator[None]:
    """Translate what Optuna and SQLAlchemy raise when the database does not answer."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, exc.SQLAlchemyError, OSError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, exc.SQLAlchemyError) else error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines() or [""]
        where = masked(address.render_as_string()) if isinstance(address, URL) else address
        kind = StoreRefusedError if _is_final(error, reason[0]) else StoreUnreachableError
        raise kind(f"the store must answer, but {where} said: {reason[0]}") from error


def _is_final(error: Exception, reason: str) -> bool:
    """Whether waiting does not mend it: a full disk, a read-only or damaged file."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EROFS, errno.EACCES}:
        return True
    words = ("readonly", "read-only", "is full", "malformed", "not a database", "disk i/o error")
    return any(word in reason.lower() for word in (*words, "unable to open"))

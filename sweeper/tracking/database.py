"""MLflow's own database: a file, or one on the store's PostgreSQL server (design decision 3).

The file is there as a whole or not at all. What MLflow creates in 2 s, SQLite commits table by
table; a server that is killed meanwhile would leave a schema that every later one refuses.

The embedded MLflow server of a PostgreSQL store keeps its runs in the database ``<name>_mlflow``
beside the store's ``<name>``. It is created by whoever comes first, and MLflow's tables by one
process at a time: of eight that create them at once, seven fail.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from filelock import FileLock
from sqlalchemy import exc
from sqlalchemy.engine import make_url

from sweeper.errors import MissingExtraError, TrackerUnreachableError
from sweeper.settings import masked, sqlite_url

_LOCK_KEY: Final = 0x6D6C666C  # "mlfl"
_EXISTS: Final = sqlalchemy.text("SELECT 1 FROM pg_database WHERE datname = :name")


def create_file(database: Path, artifacts: str) -> None:
    """MLflow's SQLite ``database`` is there, for runs with their files at the URI ``artifacts``."""
    with FileLock(f"{database}.lock"):
        if database.exists() and database.stat().st_size:
            return
        for left_over in database.parent.glob(f"{database.name}.new*"):
            left_over.unlink()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        new = database.with_name(f"{database.name}.new")
        store: Any = SqlAlchemyStore  # which is not typed
        store(sqlite_url(new), artifacts).engine.dispose()
        with contextlib.closing(sqlite3.connect(new)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
        new.replace(database)


def make_whole(database: Path) -> None:
    """Write into the SQLite file what is still beside it: a copy of the file is then all of it."""
    there = f"{database.resolve().as_uri()}?mode=rw"  # and is not created where it is not
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(there, uri=True, timeout=1.0)) as connection,
    ):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def is_there(store_url: str, tracking_uri: str) -> bool:
    """Whether the server of the store has MLflow's database."""
    with _connected(store_url) as connection:
        found = connection.execute(_EXISTS, {"name": make_url(tracking_uri).database})
        return found.first() is not None


@contextlib.contextmanager
def created(store_url: str, tracking_uri: str) -> Iterator[None]:
    """MLflow's database is there, and nobody else creates tables in it while the context lasts.

    Raises TrackerUnreachableError where the server does not answer or does not let us create it.
    """
    name = make_url(tracking_uri).database
    with _connected(store_url) as connection:
        lock = {"key": _LOCK_KEY}
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), lock)
        if connection.execute(_EXISTS, {"name": name}).first() is None:
            quoted = connection.dialect.identifier_preparer.quote_identifier(str(name))
            try:
                connection.exec_driver_sql(f"CREATE DATABASE {quoted}")
            except exc.SQLAlchemyError as error:
                raise TrackerUnreachableError(
                    f"MLflow must have the database {name!r} beside the store's, but it cannot be "
                    f"created: {_first_line(error)}; have it created: CREATE DATABASE {quoted}"
                ) from error
        yield


@contextlib.contextmanager
def _connected(store_url: str) -> Iterator[sqlalchemy.Connection]:
    """A connection to the store's database, outside of transactions; its locks end with it."""
    address = make_url(store_url).set(drivername="postgresql+psycopg")
    try:
        engine = sqlalchemy.create_engine(
            address, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT"
        )
        connection = engine.connect()
    except ImportError as error:
        raise MissingExtraError(
            "PostgreSQL needs psycopg, which is not installed; run: pip install 'sweeper[postgres]'"
        ) from error
    except exc.SQLAlchemyError as error:
        raise TrackerUnreachableError(
            f"MLflow's database is on the store's server, which must answer, but "
            f"{masked(store_url)} said: {_first_line(error)}"
        ) from error
    with connection:
        yield connection


def _first_line(error: Exception) -> str:
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

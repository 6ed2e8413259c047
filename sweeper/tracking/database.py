"""MLflow's own database: a file, or one on the store's PostgreSQL server (design decision 3).

The file is there as a whole or not at all. What MLflow creates in 2 s, SQLite commits table by
table; a server that is killed meanwhile would leave a schema that every later one refuses. Nor does
MLflow take a file that an older MLflow wrote: it is brought up to date here, and the old one stays
beside it.

The embedded MLflow server of a PostgreSQL store keeps its runs in the database ``<name>_mlflow``
beside the store's ``<name>``. It is created by whoever comes first, and MLflow's tables by one
process at a time: of eight that create them at once, seven fail.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import sqlalchemy
from filelock import FileLock
from sqlalchemy import exc
from sqlalchemy.engine import make_url

from sweeper.errors import MissingExtraError, TrackerUnreachableError
from sweeper.private import private_file
from sweeper.settings import masked, sqlite_url

_log = logging.getLogger(__name__)
_LOCK_KEY: Final = 0x6D6C666C  # "mlfl"
_EXISTS: Final = sqlalchemy.text("SELECT 1 FROM pg_database WHERE datname = :name")


def create_file(database: Path, artifacts: str) -> None:
    """MLflow's SQLite ``database`` is there, for runs with their files at the URI ``artifacts``."""
    with FileLock(f"{database}.lock"):
        there = database.exists() and database.stat().st_size
        if not there:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            new = _new(database)
            store: Any = SqlAlchemyStore  # which is not typed
            store(sqlite_url(new), artifacts).engine.dispose()
            _put_in_place(new, database)
    if there:
        bring_up_to_date(database)


def bring_up_to_date(database: Path) -> None:
    """Migrate a SQLite file that an older MLflow wrote, unless it is the installed one's already.

    A copy is migrated and then put in its place, so that an end halfway leaves the old one. Nobody
    else may be writing to it. Raises TrackerUnreachableError where a newer MLflow wrote it.
    """
    if is_current(sqlite_url(database)):
        return
    with FileLock(f"{database}.lock"):
        found = _schema(sqlite_url(database))
        if is_current(sqlite_url(database)):  # somebody else was faster
            return
        from mlflow.store.db import utils

        new, old = _new(database), database.with_name(f"{database.name}.{found}")
        make_whole(database)
        for copy in (old, new):
            private_file(copy)
            with (
                contextlib.closing(sqlite3.connect(database)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
        engine = sqlalchemy.create_engine(sqlite_url(new), poolclass=sqlalchemy.NullPool)
        cast(Any, utils)._upgrade_db(engine)
        engine.dispose()
        for beside in ("-wal", "-shm"):  # the old file's, which the copies have in them
            database.with_name(f"{database.name}{beside}").unlink(missing_ok=True)
        _put_in_place(new, database)
        _log.warning("%s is brought up to date for this MLflow; the old one is %s", database, old)


def is_current(tracking_uri: str) -> bool:
    """Whether the database has no other schema than the installed MLflow's.

    Raises TrackerUnreachableError where that is one of a newer MLflow.
    """
    found = _schema(tracking_uri)
    if found is None:
        return True
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow.store.db import utils

    scripts = ScriptDirectory.from_config(cast(Any, utils)._get_alembic_config(""))
    try:
        scripts.get_revision(found)
    except CommandError as error:
        from mlflow import __version__

        raise TrackerUnreachableError(
            f"{masked(tracking_uri)} must be a database that MLflow {__version__} knows, but a "
            f"newer one wrote it (schema {found}); install that one again"
        ) from error
    return found in scripts.get_heads()


def _schema(tracking_uri: str) -> str | None:
    """The revision of the database's schema; None where it has none yet."""
    engine = sqlalchemy.create_engine(tracking_uri, poolclass=sqlalchemy.NullPool)
    try:
        with engine.connect() as connection:
            found = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version"))
            return found.scalar()
    except exc.SQLAlchemyError:
        return None
    finally:
        engine.dispose()


def _new(database: Path) -> Path:
    """Where the file is written before it is put in its place; nothing is there."""
    for left_over in database.parent.glob(f"{database.name}.new*"):
        left_over.unlink()
    return database.with_name(f"{database.name}.new")


def _put_in_place(new: Path, database: Path) -> None:
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

"""The SQL server behind a store: connections, schema, and one lock for all controllers.

Optuna's own tables, Optuna's own storage. What is added is care (design decisions 3 and 4):

* SQLite: WAL, a busy timeout, and ``BEGIN IMMEDIATE``, without which a claim is not atomic;
  connections that only read hold up nobody.
* PostgreSQL: psycopg 3, connections checked before use, so that a restart costs no error, and given
  back to the server when they idle, so that it has room for hundreds of workers.
* The schema is created by one process at a time; who finds it complete takes no lock.
* ``grpc://host:port``: no database at all, but a controller that has one (`sweeper.store.remote`).
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.storages import RDBStorage
from sqlalchemy import event, exc
from sqlalchemy.engine import URL
from sqlalchemy.pool import QueuePool

from sweeper.address import store_address
from sweeper.errors import (
    MissingExtraError,
    UsageError,
)
from sweeper.private import FILE_MODE, private_file, private_folder
from sweeper.settings import masked
from sweeper.store import tables
from sweeper.store.cache import RecentStorage
from sweeper.store.refusals import reaching
from sweeper.store.schema import create_own_tables, is_complete

if TYPE_CHECKING:  # grpc is an extra
    from sweeper.store.remote import RemoteStorage

_BUSY_TIMEOUT_S: Final = 60
_CLIENT_PATIENCE: Final = {
    "connect_timeout": "20",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
_SERVER_PATIENCE: Final = {
    "tcp_keepalives_idle": 15,
    "tcp_keepalives_interval": 5,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "idle_in_transaction_session_timeout": 120_000,
}
"""PostgreSQL's own names; what is given with the store's URL comes after them and wins."""
_POSTGRES_LOCK_KEY: Final = 0x73776565  # "swee": the advisory lock that controllers share
_IDLE_S: Final = 5.0
"""A connection that nobody used for so long goes back to the PostgreSQL server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """An open store. ``storage`` is Optuna's; it caches finished trials.

    ``database`` is what is behind it, or None where only a controller's proxy can be reached.
    """

    url: URL
    storage: RecentStorage | RemoteStorage
    database: RDBStorage | None

    @property
    def backend(self) -> RDBStorage:
        """The database itself. Raises UsageError for a store behind a proxy."""
        if self.database is None:
            raise UsageError(
                f"{masked(str(self.url))} serves workers and nothing else; give the URL of the "
                "database itself: --store postgresql+psycopg://user@host/database"
            )
        return self.database

    @property
    def remote(self) -> RemoteStorage | None:
        """The way to the controller that has the database, where this process has none."""
        return self.storage if not isinstance(self.storage, RecentStorage) else None

    def close(self) -> None:
        """Give every connection back."""
        if remote := self.remote:
            remote.close()
            return
        self.backend.remove_session()
        _close_connections(self.backend.engine)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlalchemy.Connection]:
        """A connection for queries, which all see the same moment. Locks nothing."""
        with reaching(self.url), tables.reading(self.backend.engine) as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlalchemy.Connection]:
        """A transaction: all of it is stored at the end, or nothing."""
        with reaching(self.url), self.backend.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Hold the store's one lock: what a controller reads in here nobody enqueues against."""
        _ = self.backend  # which says so where there is none
        with reaching(self.url), _server_lock(self.url):
            yield

    @contextlib.contextmanager
    def alone(self, study_id: int, *, timeout_s: float = 0.0) -> Iterator[bool]:
        """Whether this process may finish the study: one at a time has the right to.

        Waits ``timeout_s`` for it. It is given back as the context ends, or the process.
        """
        with contextlib.ExitStack() as stack:
            with reaching(self.url):
                held = stack.enter_context(_study_lock(self, study_id, timeout_s))
            yield held


def open_store(url: str, *, pool: int = 1, slack_s: float = 0.0) -> Store:
    """Open the store at ``url``, creating its tables if this is the first time.

    ``pool`` connections are kept while they are used, and as many more are opened at need. A lock
    has a connection of its own, so that who holds it cannot wait for itself.
    ``slack_s``: trials that are read may be so old.

    Raises:
        UsageError: the URL is not one of SQLite, PostgreSQL or a controller's proxy.
        MissingExtraError: PostgreSQL without psycopg, a proxy without grpcio.
        StoreUnreachableError: the server does not answer, or the file cannot be written.
    """
    address = store_address(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if address.drivername == "grpc":
        from sweeper.store.remote import connect

        with reaching(address):
            return Store(url=address, storage=connect(address), database=None)
    with reaching(address), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if address.get_backend_name() == "sqlite":
            with _server_lock(address):
                backend = _open_sqlite(address)
        else:
            backend = _open_postgres(address, pool)
    return Store(url=address, database=backend, storage=RecentStorage(backend, slack_s=slack_s))


def _watchful(address: URL) -> URL:
    """Let both ends notice within half a minute that the other has been cut off.

    Otherwise a worker would wait for hours for an answer that never comes, and the server would
    keep the locks of a transaction, or the store's own, that such a worker held.
    """
    if address.get_driver_name() not in {"psycopg", "psycopg2"}:
        return address  # its driver takes other words
    asked = dict(address.query)
    given = asked.get("options") or ""
    given = given if isinstance(given, str) else " ".join(given)
    settings = (f"-c {name}={value}" for name, value in _SERVER_PATIENCE.items())
    return address.set(
        query={**_CLIENT_PATIENCE, **asked, "options": " ".join([*settings, given]).strip()}
    )


def _open_sqlite(address: URL) -> RDBStorage:
    """Under the lock. SQLite tells in no time that its tables are there."""
    file = Path(str(address.database))
    private_folder(file.parent)
    private_file(file)  # what SQLite puts beside it gets the same mode
    url = address.render_as_string(hide_password=False)
    backend = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _BUSY_TIMEOUT_S}})
    event.listen(backend.engine, "connect", _prepare_sqlite)
    event.listen(backend.engine, "begin", _begin)
    backend.engine.dispose()  # connections made before the listeners
    create_own_tables(backend.engine)
    # Also where the process ends in order: whoever closes the last connection has all that is
    # beside the file written into it, and the file alone is the whole store then.
    weakref.finalize(backend, backend.engine.dispose)
    return backend


def _open_postgres(address: URL, pool: int) -> RDBStorage:
    """Hundreds of workers may start at once: only those that find no schema wait for each other."""
    url = _watchful(address).render_as_string(hide_password=False)
    options = {
        "pool_pre_ping": True,
        "pool_size": pool,
        "max_overflow": pool,
        "pool_recycle": 600,
        "pool_timeout": _BUSY_TIMEOUT_S,
    }
    try:
        if not _schema_is_there(address):
            with _server_lock(address):
                if not _schema_is_there(address):  # nobody was faster
                    first = RDBStorage(url)
                    create_own_tables(first.engine)
                    first.engine.dispose()
        backend = RDBStorage(url, engine_kwargs=options, skip_table_creation=True)
    except ImportError as error:
        raise MissingExtraError(
            "PostgreSQL needs psycopg, which is not installed; run: pip install 'sweeper[postgres]'"
        ) from error
    _release_idle(backend.engine)
    return backend


def _schema_is_there(address: URL) -> bool:
    engine = sqlalchemy.create_engine(_watchful(address), poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return is_complete(connection)


def _release_idle(engine: sqlalchemy.Engine) -> None:
    """Close the pool's connections whenever nobody has used one for a while.

    The thread ends with the process; it holds nothing that has to be put away.
    """
    used = threading.Event()
    event.listen(engine, "checkout", lambda *_: used.set())

    def watch() -> None:
        while True:
            time.sleep(_IDLE_S)
            if used.is_set():
                used.clear()
            elif isinstance(engine.pool, QueuePool) and not engine.pool.checkedout():
                _close_connections(engine)

    threading.Thread(target=watch, name="idle connections", daemon=True).start()


def _close_connections(engine: sqlalchemy.Engine) -> None:
    """Close those that are idle now, and one that a thread still uses when it gives it back."""
    event.listen(engine.pool, "checkin", lambda connection, _: connection and connection.close())
    engine.dispose()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_S * 1000}")
    cursor.close()


def _begin(connection: sqlalchemy.Connection) -> None:
    reads = connection.get_execution_options().get(tables.READS, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


@contextlib.contextmanager
def _server_lock(address: URL) -> Iterator[None]:
    """One holder among all processes that use the database: a file lock or an advisory lock."""
    if address.get_backend_name() == "sqlite":
        file = Path(str(address.database)).absolute()
        private_folder(file.parent)
        with FileLock(f"{file}.lock", mode=FILE_MODE):
            yield
        return
    engine = sqlalchemy.create_engine(_watchful(address), poolclass=sqlalchemy.NullPool)
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


@contextlib.contextmanager
def _study_lock(store: Store, study_id: int, timeout_s: float) -> Iterator[bool]:
    """One holder a study: a file lock, or an advisory lock of a connection of its own."""
    if store.url.get_backend_name() == "sqlite":
        lock = FileLock(
            f"{Path(str(store.url.database)).absolute()}.{study_id}.lock", mode=FILE_MODE
        )
        try:
            lock.acquire(timeout=timeout_s)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
        return
    engine = sqlalchemy.create_engine(store.backend.engine.url, poolclass=sqlalchemy.NullPool)
    connection = engine.connect()
    try:
        key = {"key": _POSTGRES_LOCK_KEY, "study": study_id}
        attempt = sqlalchemy.text("SELECT pg_try_advisory_lock(:key, :study)")
        until = time.monotonic() + timeout_s
        while not (held := bool(connection.execute(attempt, key).scalar_one())):
            connection.commit()
            if time.monotonic() > until:
                break
            time.sleep(1.0)
        connection.commit()
        yield held
    finally:  # the end of the connection gives the lock back
        with contextlib.suppress(exc.SQLAlchemyError):
            connection.close()

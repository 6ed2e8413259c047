"""What addresses may be: of a store (a file, a PostgreSQL database, a proxy), and of MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Final
from urllib.parse import urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from sweeper.errors import UsageError

_WEB: Final = frozenset({"http", "https"})
_MLFLOWS_OWN: Final = frozenset(
    {"sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc"}
)
"""What MLflow knows beside web addresses and folders; its plugins bring others."""


def store_address(url: str) -> URL:
    """What a store's URL names, the driver included: a file, a database, or a controller's proxy.

    Raises UsageError, without what may be secret in the URL, where no store can be there.
    """
    try:
        address = make_url(url)
        if address.port is not None and not 0 < address.port < 65536:
            raise ValueError(f"port {address.port}")
    except ArgumentError as error:
        raise UsageError(
            "the store must be a URL such as sqlite:///sweeps.db or "
            "postgresql+psycopg://user@host/database, but got something that is not a URL"
        ) from error
    except ValueError as error:  # of make_url too; a password may stand where a port should
        raise UsageError(
            "the port in the store's URL must be a number from 1 to 65535, but is not; write "
            "postgresql+psycopg://user@host:5432/database, and :, / and @ in a password as %3A, "
            "%2F and %40"
        ) from error
    match address.get_backend_name():
        case "grpc" if address.drivername == "grpc":
            if not address.host:
                raise UsageError("a proxy must be given as grpc://host:port, but got no host")
            return address
        case "sqlite":
            if address.host or address.database in {None, "", ":memory:"}:
                raise UsageError(
                    "a store must be a file that several processes can open, but got an in-memory "
                    "SQLite database, or two slashes for three; write sqlite:///path/to/file.db"
                )
        case "postgresql":
            if not address.database:
                raise UsageError(
                    "the URL of a PostgreSQL store must name a database, but got none; write "
                    "postgresql+psycopg://user@host/database"
                )
        case other:
            raise UsageError(
                f"the store must be SQLite or PostgreSQL, but got {other!r}; "
                "write sqlite:///…, postgresql+psycopg://… or, for a worker, grpc://host:port"
            )
    return _with_driver(address)


def _with_driver(address: URL) -> URL:
    """psycopg where none is named. Raises UsageError for a driver that cannot serve."""
    if address.drivername == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    try:
        usable = not address.get_dialect().is_async
    except NoSuchModuleError:
        usable = False
    if not usable:
        raise UsageError(
            f"the driver in the store's URL must be one that SQLAlchemy knows and that is not "
            f"asynchronous, but got {address.drivername!r}; write postgresql+psycopg:// or sqlite://"
        )
    return address


def host_of(address: URL) -> str | None:
    """The host, or the folder of a socket; several with commas between; None for this machine.

    PostgreSQL's client takes it from the parameter ``host`` as well.
    """
    found = address.host or address.query.get("host")
    return found if found is None or isinstance(found, str) else ",".join(found)


def refuse_tracking_uri(uri: str | None, environment: Mapping[str, str] | None = None) -> None:
    """Raise UsageError where MLflow cannot be at ``uri``: it would say so after the training.

    It takes no folders any more, unless it is told to.
    """
    if uri is None or uri in _MLFLOWS_OWN:
        return
    env = os.environ if environment is None else environment
    try:
        scheme, host = urlsplit(uri).scheme.partition("+")[0], urlsplit(uri).hostname
    except ValueError:  # brackets with no address in them
        scheme, host = "http", None
    if not uri.strip():
        found = "nothing"
    elif scheme in _WEB:
        found = "" if host else "no host"
    elif scheme in {"", "file"}:
        allowed = env.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in {"true", "1"}
        found = "" if allowed else "a folder"
    else:
        plugins = {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
        found = "" if scheme in _MLFLOWS_OWN | plugins else f"the scheme {scheme!r}"
    if found:
        raise UsageError(
            f"MLFLOW_TRACKING_URI must be an MLflow server or its database, but got {found}; set "
            "http://host:port or sqlite:////path/to/mlflow.db, or unset it: then a server is "
            "started"
        )

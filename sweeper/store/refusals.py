"""What a database says when it does not let us in, in words that say what to do.

PostgreSQL and its client tell why a connection failed in a line of English and in no other way, so
that line is what is read here. What is not among :data:`_ADVICE` is passed on as it is.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Final

import optuna
from sqlalchemy import exc
from sqlalchemy.engine import URL

from sweeper.errors import StoreRefusedError, StoreUnreachableError, SweeperError, UsageError
from sweeper.settings import masked

_FINAL_ERRNOS: Final = {errno.ENOSPC, errno.EROFS, errno.EACCES}
_FINAL: Final = (
    *("readonly", "read-only", "is full", "malformed", "not a database", "disk i/o error"),
    "unable to open",
)

_ADVICE: Final[Mapping[str, str]] = {
    "no password supplied": (
        "set PGPASSWORD, or put it into a file that only you can read and that PGPASSFILE names "
        "(~/.pgpass), or give the whole URL in SWEEPER_STORE"
    ),
    "password authentication failed": (
        "the role must exist, and its password be the one in the URL, in PGPASSWORD, or in the "
        "file that PGPASSFILE names (~/.pgpass)"
    ),
    'role ".*" does not exist': (
        "name another in the URL, or have it created: CREATE ROLE {role} LOGIN PASSWORD '…'"
    ),
    "is not permitted to log in": "have that changed: ALTER ROLE {role} LOGIN",
    'database ".*" does not exist': "have it created: CREATE DATABASE {database} OWNER {role}",
    "permission denied for": (
        "the role must own the database, and the tables that are in it: "
        "ALTER DATABASE {database} OWNER TO {role}"
    ),
    "no pg_hba.conf entry": "a line of the server's pg_hba.conf must let the role in from here",
    "certificate verify failed": (
        "sslrootcert in the URL, or PGSSLROOTCERT, must name the certificate of the authority that "
        "signed the server's"
    ),
    "root certificate file": (
        "sslrootcert in the URL, or PGSSLROOTCERT, must name the certificate of the server's "
        "authority"
    ),
    "does not match host name": "name the host in the URL as its certificate does",
    "server does not support SSL": (
        "have TLS set up at the server, or ask for another sslmode in the URL or in PGSSLMODE"
    ),
}
"""What PostgreSQL says, and what to do then."""

_MISTAKE: Final = re.compile(r'(connection is bad: )?invalid (connection option "|\w+ value: ")')
"""What PostgreSQL's client says of a URL before it connects anywhere."""


@contextlib.contextmanager
def reaching(address: URL | str) -> Iterator[None]:
    """Translate what Optuna and SQLAlchemy raise when the database does not answer."""
    try:
        yield
    except _failures() as error:
        cause = error.__cause__ if isinstance(error.__cause__, exc.SQLAlchemyError) else error
        reason = (_reason(cause).strip().splitlines() or [""])[0]
        where = masked(address.render_as_string()) if isinstance(address, URL) else address
        said = f"the store must answer, but {where} said: {reason}"
        raise _kind(error, reason)(said + _advice(reason, address)) from error


def _failures() -> tuple[type[Exception], ...]:
    """What is raised when a database does not answer; by gRPC too, in a process that uses it."""
    grpc = sys.modules.get("grpc")
    usual = (optuna.exceptions.StorageInternalError, exc.SQLAlchemyError, OSError)
    return usual if grpc is None else (*usual, grpc.RpcError)


def _reason(error: BaseException) -> str:
    """What the driver, or a proxy, said."""
    details = getattr(error, "details", None)
    if callable(details):
        return str(details() or error)
    return str(getattr(error, "orig", None) or error)


def _kind(error: Exception, reason: str) -> type[SweeperError]:
    """Whether the URL is wrong, or no waiting mends it (a full disk, a read-only file), or some."""
    if _MISTAKE.match(reason):
        return UsageError
    refused = isinstance(error, OSError) and error.errno in _FINAL_ERRNOS
    if refused or any(word in reason.lower() for word in _FINAL):
        return StoreRefusedError
    return StoreUnreachableError


def _advice(reason: str, address: URL | str) -> str:
    """What to do, with the names that the server used or else those in the URL."""
    for words, advice in _ADVICE.items():
        if re.search(words, reason):
            url = address if isinstance(address, URL) else URL.create("postgresql")
            role = re.search('(?:user|role) "(.+?)"', reason)
            database = re.search('database "(.+?)"', reason)
            names = {
                "role": role[1] if role else url.username or "…",
                "database": database[1] if database else url.database or "…",
            }
            return "; " + advice.format(**{name: f'"{value}"' for name, value in names.items()})
    return ""

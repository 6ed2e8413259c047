"""Fixtures shared by all tests: real servers, started once."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server that ends with the tests."""
    pgserver = pytest.importorskip("pgserver", reason="the wheel pgserver is not installed")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="session")
def postgres_database(postgres_server: str) -> Callable[[], str]:
    """Creates an empty database and gives its URL."""
    admin = sqlalchemy.make_url(postgres_server).set(drivername="postgresql+psycopg")

    def create() -> str:
        name = f"sweeps_{uuid.uuid4().hex[:12]}"
        engine = sqlalchemy.create_engine(admin, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f'CREATE DATABASE "{name}"'))
        engine.dispose()
        return admin.set(database=name).render_as_string(hide_password=False)

    return create

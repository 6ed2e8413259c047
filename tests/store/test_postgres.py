"""PostgreSQL: many at once, few connections, no password where it can be read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy

from sweeper.errors import StoreUnreachableError
from sweeper.store import database, open_store, studies

pytestmark = pytest.mark.postgres

_OPEN_FIFTY = """
import os, sys
import sweeper.store.database as database  # loaded once; fifty times would take a minute

children = []
for _ in range(50):
    if (child := os.fork()) == 0:
        try:
            database.open_store(sys.argv[1])
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


def test_fifty_processes_open_an_empty_store_at_once(
    postgres_database: Callable[[], str],
) -> None:
    url = postgres_database()
    done = subprocess.run(
        [sys.executable, "-c", _OPEN_FIFTY, url],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    store = open_store(url)
    assert studies.names(store) == []
    store.close()


def test_connections_that_idle_go_back_to_the_server(
    postgres_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_IDLE_S", 0.1)
    url = postgres_database()
    store = open_store(url)
    studies.names(store)
    watcher = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    others = sqlalchemy.text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    until = time.monotonic() + 20
    count = -1
    while count and time.monotonic() < until:
        with watcher.connect() as connection:
            count = connection.execute(others).scalar_one()
        time.sleep(0.05)
    assert count == 0
    assert studies.names(store) == []  # and are opened again
    store.close()


def test_a_server_restart_costs_no_error(postgres_database: Callable[[], str]) -> None:
    url = postgres_database()
    store = open_store(url)
    studies.names(store)
    admin = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text(kill))
    assert studies.names(store) == []
    store.close()


def test_passwords_are_in_no_message(postgres_database: Callable[[], str]) -> None:
    parsed = sqlalchemy.make_url(postgres_database())
    wrong = parsed.set(username="nobody", password="geheim", database="nowhere")
    with pytest.raises(StoreUnreachableError) as caught:
        open_store(wrong.render_as_string(hide_password=False))
    assert "geheim" not in str(caught.value)
    assert "nowhere" in str(caught.value)

"""What is ours beside Optuna's tables: who works on this store, and an index for the queue.

Neither needs migrations: what the table holds, workers tell again within a heartbeat.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy
from sqlalchemy import Column, DateTime, Float, Integer, MetaData, String, Table, Text

_METADATA: Final = MetaData()

WORKERS: Final = Table(
    "sweeper_workers",
    _METADATA,
    Column("name", String(255), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", String(255), nullable=False),
    Column("launcher", String(64), nullable=False),
    Column("study", String(255)),
    Column("trials", Text),
    Column("samples_per_s", Float),
    Column("problem", Text),
    Column("started", DateTime, nullable=False),
    Column("seen", DateTime, nullable=False),
)
"""``started`` and ``seen`` by the database's own clock, in UTC."""


_INDEX: Final = """
CREATE INDEX IF NOT EXISTS sweeper_trials_by_state ON trials (study_id, state, trial_id)
"""
"""Without it, finding the oldest waiting trial means looking at every trial before it. Optuna's own
migrations neither need nor mind it, and a store that lacks it works as well, but slower."""


def create_own_tables(engine: sqlalchemy.Engine) -> None:
    """Create what is missing. Call it under the store's lock, after Optuna has created its own."""
    with engine.begin() as connection:
        _METADATA.create_all(connection)
        connection.execute(sqlalchemy.text(_INDEX))


def is_complete(connection: sqlalchemy.Connection) -> bool:
    """Whether Optuna's tables and our own are there: ours is the last to be created."""
    return sqlalchemy.inspect(connection).has_table(WORKERS.name)

"""Who works on a store: one row a worker, written anew with every heartbeat.

Nothing depends on it. It is for people and for `/metrics`; what a worker holds is in the trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy
from sqlalchemy.dialects import postgresql, sqlite

from sweeper.store.database import Store
from sweeper.store.refusals import reaching
from sweeper.store.schema import WORKERS

ALIVE_S: Final = 60.0
"""Who was silent for longer counts as gone."""
_KEPT: Final = timedelta(days=1)
_PROBLEM_CHARACTERS: Final = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Presence:
    """What a worker says of itself. ``trials`` are numbers in ``study``, both empty while it waits.

    ``samples_per_s`` is the throughput of the last epoch, ``problem`` what keeps it from a study.
    """

    name: str
    host: str
    pid: int
    device: str
    launcher: str
    study: str | None = None
    trials: tuple[int, ...] = ()
    samples_per_s: float | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerRow:
    """A worker as the store knows it; ``silent_s`` since its last heartbeat, ``age_s`` in all."""

    presence: Presence
    silent_s: float
    age_s: float

    @property
    def alive(self) -> bool:
        return self.silent_s < ALIVE_S

    def public(self) -> dict[str, Any]:
        """The row as ``workers --json`` prints it."""
        return {
            **asdict(self.presence),
            "heartbeat_age_s": round(self.silent_s, 1),
            "age_s": round(self.age_s, 1),
            "alive": self.alive,
        }


def tell(store: Store, presence: Presence) -> None:
    """Write a worker's row, with the database's clock."""
    if remote := store.remote:
        with reaching(store.url):
            remote.call("tell", **asdict(presence))
        return
    engine = store.backend.engine
    told: dict[str, Any] = {
        **asdict(presence),
        "trials": " ".join(map(str, presence.trials)),
        "problem": (presence.problem or "")[:_PROBLEM_CHARACTERS] or None,
        "seen": _now(engine),
    }
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    statement = insert(WORKERS).values(**told, started=_now(engine))
    statement = statement.on_conflict_do_update(index_elements=["name"], set_=told)
    with reaching(store.url), engine.begin() as connection:
        connection.execute(statement)


def told_by(said: Mapping[str, Any]) -> Presence:
    """A presence that came as plain data."""
    return Presence(**{**said, "trials": tuple(said.get("trials", ()))})


def leave(store: Store, name: str) -> None:
    """Remove the row of a worker that ends."""
    with reaching(store.url):
        if remote := store.remote:
            remote.call("leave", name=name)
            return
        with store.backend.engine.begin() as connection:
            connection.execute(WORKERS.delete().where(WORKERS.c.name == name))


def listed(store: Store) -> list[WorkerRow]:
    """Every worker of the store, by launcher, host and name."""
    engine = store.backend.engine
    order = (WORKERS.c.launcher, WORKERS.c.host, WORKERS.c.name)
    with reaching(store.url), engine.connect() as connection:
        now = _datetime(connection.execute(sqlalchemy.select(_now(engine))).scalar_one())
        found = connection.execute(sqlalchemy.select(WORKERS).order_by(*order)).mappings().all()
    return [_row(dict(row), now) for row in found]


def sweep(store: Store) -> int:
    """Remove the rows of workers that have been silent for a day; how many."""
    engine = store.backend.engine
    with reaching(store.url), engine.begin() as connection:
        now = _datetime(connection.execute(sqlalchemy.select(_now(engine))).scalar_one())
        gone = connection.execute(WORKERS.delete().where(WORKERS.c.seen < now - _KEPT))
        return int(gone.rowcount)


def _row(row: Mapping[str, Any], now: datetime) -> WorkerRow:
    known = {name: row[name] for name in Presence.__dataclass_fields__}
    trials = tuple(int(number) for number in (row["trials"] or "").split())
    return WorkerRow(
        presence=Presence(**{**known, "trials": trials}),
        silent_s=max(0.0, (now - row["seen"]).total_seconds()),
        age_s=max(0.0, (now - row["started"]).total_seconds()),
    )


def _now(engine: sqlalchemy.Engine) -> sqlalchemy.ColumnElement[Any]:
    """The database's clock in UTC, whatever time zone the session has."""
    now: sqlalchemy.ColumnElement[Any] = sqlalchemy.func.now()
    return sqlalchemy.func.timezone("utc", now) if engine.dialect.name == "postgresql" else now


def _datetime(value: datetime | str) -> datetime:
    found = datetime.fromisoformat(value) if isinstance(value, str) else value
    return found.replace(tzinfo=None)

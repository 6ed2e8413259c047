"""Optuna's tables, read and written in bulk.

Optuna's storage writes a trial a transaction and reads through its object mapper. Both cost little
for one trial and a lot for ten thousand: counting the trials before each new one is quadratic, and
the mapper makes an object of every epoch's value. These functions write and read the same rows in a
few statements. Every one works inside the transaction of the connection it gets.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.dialects import postgresql, sqlite

TRIALS: Final = models.TrialModel.__table__
FACTS: Final = models.TrialUserAttributeModel.__table__
SYSTEM: Final = models.TrialSystemAttributeModel.__table__
PARAMS: Final = models.TrialParamModel.__table__
VALUES: Final = models.TrialValueModel.__table__
EPOCHS: Final = models.TrialIntermediateValueModel.__table__
BEATS: Final = models.TrialHeartbeatModel.__table__

READS: Final = "sweeper_reads"
"""The execution option of a connection that is not going to write."""

_AT_ONCE: Final = 1000
_LOCKED_AT_ONCE: Final = 500
_SPECIAL: Final = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}


@contextmanager
def reading(engine: sqlalchemy.Engine) -> Iterator[sqlalchemy.Connection]:
    """A connection that sees the database as it is at its first query, and holds nobody up."""
    with engine.connect() as connection:
        options: dict[str, Any] = {READS: True}
        if engine.dialect.name == "postgresql":
            options["isolation_level"] = "REPEATABLE READ"
        yield connection.execution_options(**options)


def insert(
    connection: sqlalchemy.Connection, study_id: int, trials: Sequence[FrozenTrial]
) -> list[int]:
    """Add ``trials`` to a study, numbered on from its last; their numbers."""
    if not trials:
        return []
    studies = models.StudyModel.__table__
    lock = sqlalchemy.select(studies.c.study_id).where(studies.c.study_id == study_id)
    connection.execute(lock.with_for_update())  # two that add must not give one number twice
    last = sqlalchemy.select(sqlalchemy.func.max(TRIALS.c.number))
    highest = connection.execute(last.where(TRIALS.c.study_id == study_id)).scalar()
    first = 0 if highest is None else highest + 1
    numbers = list(range(first, first + len(trials)))
    connection.execute(
        sqlalchemy.insert(TRIALS),
        [
            {
                "number": number,
                "study_id": study_id,
                "state": trial.state,
                "datetime_start": utc(trial.datetime_start),
                "datetime_complete": utc(trial.datetime_complete),
            }
            for number, trial in zip(numbers, trials, strict=True)
        ],
    )
    ids = sqlalchemy.select(TRIALS.c.trial_id).order_by(TRIALS.c.number)
    ids = ids.where(TRIALS.c.study_id == study_id, TRIALS.c.number >= first)
    pairs = list(zip(connection.execute(ids).scalars(), trials, strict=True))
    for table, rows in _details(pairs).items():
        if rows:
            connection.execute(sqlalchemy.insert(table), rows)
    return numbers


def _details(
    pairs: Sequence[tuple[int, FrozenTrial]],
) -> dict[sqlalchemy.Table, list[dict[str, Any]]]:
    """The rows of the other tables for trials with their ids."""
    value = models.TrialValueModel
    rows: dict[sqlalchemy.Table, list[dict[str, Any]]] = defaultdict(list)
    for trial_id, trial in pairs:
        for name, known in trial.params.items():
            options = trial.distributions[name]
            rows[PARAMS].append(
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": options.to_internal_repr(known),
                    "distribution_json": distribution_to_json(options),
                }
            )
        for table, known_facts in ((FACTS, trial.user_attrs), (SYSTEM, trial.system_attrs)):
            rows[table] += [
                {"trial_id": trial_id, "key": key, "value_json": json.dumps(fact)}
                for key, fact in known_facts.items()
            ]
        for objective, reached in enumerate(trial.values or ()):
            stored, kind = value.value_to_stored_repr(reached)
            rows[VALUES].append(
                {
                    "trial_id": trial_id,
                    "objective": objective,
                    "value": stored,
                    "value_type": kind,
                }
            )
        rows[EPOCHS] += _epoch_rows(trial_id, trial.intermediate_values)
    return rows


def read(
    connection: sqlalchemy.Connection,
    trial_ids: Iterable[int],
    known: dict[str, BaseDistribution] | None = None,
) -> list[FrozenTrial]:
    """The trials with these ids, whole, by id. ``known`` keeps parsed distributions for later.

    A trial's state is read before the rest: one that is finished is whole.
    """
    known = {} if known is None else known
    ids = iter(sorted(trial_ids))
    found: list[FrozenTrial] = []
    while some := list(islice(ids, _AT_ONCE)):
        trials = {trial._trial_id: trial for trial in _heads(connection, some)}
        for trial_id, name, value, options in _rows(connection, PARAMS, some, "param_id"):
            distribution = known.get(options)
            if distribution is None:
                distribution = known[options] = json_to_distribution(options)
            name = sys.intern(name)
            trials[trial_id]._distributions[name] = distribution
            trials[trial_id]._params[name] = distribution.to_external_repr(value)
        for trial_id, key, fact in _rows(connection, FACTS, some):
            trials[trial_id]._user_attrs[sys.intern(key)] = json.loads(fact)
        for trial_id, key, fact in _rows(connection, SYSTEM, some):
            trials[trial_id]._system_attrs[sys.intern(key)] = json.loads(fact)
        for trial_id, step, value, kind in _rows(connection, EPOCHS, some):
            value = _SPECIAL[kind] if value is None else value
            trials[trial_id].intermediate_values[step] = value
        reached: dict[int, list[float]] = defaultdict(list)
        for trial_id, _, value, kind in _rows(connection, VALUES, some, "objective"):
            reached[trial_id].append(_SPECIAL[kind] if value is None else value)
        for trial_id, values in reached.items():
            trials[trial_id].values = values
        found += trials.values()
    return found


def _heads(connection: sqlalchemy.Connection, some: Sequence[int]) -> Iterator[FrozenTrial]:
    query = sqlalchemy.select(TRIALS).where(TRIALS.c.trial_id.in_(some)).order_by(TRIALS.c.trial_id)
    for row in connection.execute(query):
        yield FrozenTrial(
            number=row.number,
            state=row.state,
            value=None,
            datetime_start=local(row.datetime_start),
            datetime_complete=local(row.datetime_complete),
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
            trial_id=row.trial_id,
        )


def _rows(
    connection: sqlalchemy.Connection,
    table: sqlalchemy.Table,
    some: Sequence[int],
    order: str | None = None,
) -> Iterable[Any]:
    """The rows of a table that belong to these trials, without their own ids."""
    columns = [
        # an enumeration's name is enough, and three hundred thousand of them need not be parsed
        sqlalchemy.type_coerce(column, sqlalchemy.String)
        if isinstance(column.type, sqlalchemy.Enum)
        else column
        for column in table.columns
        if not column.primary_key
    ]
    query = sqlalchemy.select(*columns).where(table.c.trial_id.in_(some))
    if order is not None:
        query = query.order_by(table.c[order])
    return connection.execute(query)


def facts(connection: sqlalchemy.Connection, study_id: int, name: str) -> dict[int, Any]:
    """One user attribute of a study's trials: number → value, of those that have it."""
    query = (
        sqlalchemy.select(TRIALS.c.number, FACTS.c.value_json)
        .join(FACTS, FACTS.c.trial_id == TRIALS.c.trial_id)
        .where(TRIALS.c.study_id == study_id, FACTS.c.key == name)
    )
    return {number: json.loads(value) for number, value in connection.execute(query)}


def write_facts(connection: sqlalchemy.Connection, trial_id: int, facts: Mapping[str, Any]) -> None:
    """Set user attributes of a trial, new ones or in place of what was there.

    Raises UpdateFinishedTrialError, as Optuna does, where the trial has ended.
    """
    _hold(connection, trial_id)
    put_facts(connection, trial_id, facts)


def put_facts(connection: sqlalchemy.Connection, trial_id: int, facts: Mapping[str, Any]) -> None:
    """As :func:`write_facts`, for a trial that this transaction holds already."""
    rows = [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(fact)}
        for key, fact in facts.items()
    ]
    _upsert(connection, FACTS, rows, by=("trial_id", "key"))


def write_attributes(
    connection: sqlalchemy.Connection,
    trial_id: int,
    system: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """As :func:`write_facts`, and beside them what Optuna keeps for itself: system attributes."""
    _hold(connection, trial_id)
    rows = [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(known)}
        for key, known in system.items()
    ]
    _upsert(connection, SYSTEM, rows, by=("trial_id", "key"))
    put_facts(connection, trial_id, facts)


def write_reports(
    connection: sqlalchemy.Connection, reports: Mapping[int, Mapping[int, float]]
) -> set[int]:
    """Set trials' intermediate values (id → epoch → value), new ones or in place of what was there;
    which trials have ended or are gone.

    Those get nothing, the others all of it.
    """
    unfinished = _hold_all(connection, reports)
    rows = [
        row for trial_id in sorted(unfinished) for row in _epoch_rows(trial_id, reports[trial_id])
    ]
    _upsert(connection, EPOCHS, rows, by=("trial_id", "step"))
    return set(reports) - unfinished


def write_beats(connection: sqlalchemy.Connection, trial_ids: Iterable[int]) -> None:
    """Let these trials' workers have been heard of now, by the database's clock.

    A trial's claim wrote the row. Where that is gone, the trial is, and nothing is to be written.
    """
    ids = iter(sorted(trial_ids))
    while some := list(islice(ids, _LOCKED_AT_ONCE)):
        connection.execute(
            sqlalchemy.update(BEATS)
            .where(BEATS.c.trial_id.in_(some))
            .values(heartbeat=sqlalchemy.func.now())
        )


def _epoch_rows(trial_id: int, series: Mapping[int, float]) -> Iterator[dict[str, Any]]:
    for step, reached in series.items():
        stored, special = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(
            reached
        )
        yield {
            "trial_id": trial_id,
            "step": step,
            "intermediate_value": stored,
            "intermediate_value_type": special,
        }


def _hold(connection: sqlalchemy.Connection, trial_id: int) -> None:
    """Lock a trial's row for this transaction, unless the trial has ended.

    Raises KeyError where there is no such trial, any more or at all.
    """
    query = sqlalchemy.select(TRIALS.c.state).where(TRIALS.c.trial_id == trial_id)
    state = connection.execute(query.with_for_update()).scalar_one_or_none()
    if state is None:
        raise KeyError(f"no trial has the id {trial_id}")
    if state.is_finished():
        raise UpdateFinishedTrialError(f"trial {trial_id} has ended and must not be changed")


def _hold_all(connection: sqlalchemy.Connection, trial_ids: Iterable[int]) -> set[int]:
    """Lock these trials' rows as :func:`_hold` does; the ids of those that have not ended.

    In the order of their ids: two that lock some of the same must not wait for each other.
    """
    ids = iter(sorted(trial_ids))
    unfinished: set[int] = set()
    while some := list(islice(ids, _LOCKED_AT_ONCE)):
        query = (
            sqlalchemy.select(TRIALS.c.trial_id, TRIALS.c.state)
            .where(TRIALS.c.trial_id.in_(some))
            .order_by(TRIALS.c.trial_id)
            .with_for_update()
        )
        found = connection.execute(query)
        unfinished.update(trial_id for trial_id, state in found if not state.is_finished())
    return unfinished


def _upsert(
    connection: sqlalchemy.Connection,
    table: sqlalchemy.Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    by: Sequence[str],
) -> None:
    """Insert rows, or let them replace those with the same values of the columns ``by``.

    The rows are parameters of one statement, which SQLAlchemy compiles once a process.
    """
    if not rows:
        return
    statement = upserting(connection)(table)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[table.c[name] for name in by],
            set_={name: statement.excluded[name] for name in rows[0] if name not in by},
        ),
        rows,
    )


def upserting(connection: sqlalchemy.Connection) -> Any:
    """The dialect's INSERT, which can update a row that is there."""
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert


def utc(moment: datetime | None) -> datetime | None:
    """Optuna keeps naive UTC in its tables, and naive local time in its trials."""
    return None if moment is None else moment.astimezone(UTC).replace(tzinfo=None)


def local(moment: datetime | None) -> datetime | None:
    """The way back from :func:`utc`."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)

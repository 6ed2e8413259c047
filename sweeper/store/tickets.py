"""A study's plan as waiting trials: which trials it is to have, and enqueueing those it lacks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ValidationError

from sweeper.config import TrialConfig
from sweeper.grid import grid
from sweeper.space import contains
from sweeper.store import attributes as attr
from sweeper.store import recovery, sampling, tables
from sweeper.store.database import Store
from sweeper.store.queue import values
from sweeper.store.tables import FACTS, PARAMS, TRIALS
from sweeper.study.point import still_open
from sweeper.study.spec import Grid, ReferenceOnly, StudySpec

_SAMPLER: Final = "sampler"
_GRID: Final = "grid"
_REFERENCE: Final = "reference"
_ASKED: Final = "asked"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A trial that the study is to have.

    ``values`` None: the sampler decides; otherwise exactly these. ``key`` says which trial of the
    plan it is; those of the sampler share one, and so do points that are listed twice.
    """

    key: str
    values: Mapping[str, Any] | None = None


def tickets(spec: StudySpec, *, with_reference: bool) -> list[Ticket]:
    """Every trial of a study in the order in which they are to run.

    Published configurations come first. A grid point that was published is not run twice.
    """
    published = (
        list(spec.reference.trials)
        if spec.reference and (with_reference or isinstance(spec.search.sampler, ReferenceOnly))
        else []
    )
    result = [
        Ticket(key=_key(_REFERENCE, trial.params), values=trial.params) for trial in published
    ]
    match spec.search.sampler:
        case ReferenceOnly():
            return result
        case Grid():
            points = [
                Ticket(key=_key(_GRID, point), values=point) for point in grid(spec.parameters)
            ]
            taken = [_config(spec, trial.params) for trial in published]
            return result + [
                ticket
                for ticket in points
                if not taken or _config(spec, ticket.values or {}) not in taken
            ]
    free = Ticket(key=_SAMPLER, values=None if spec.parameters else {})
    return result + [free] * (spec.search.trials or 1)


def enqueue(store: Store, study_id: int, spec: StudySpec, point: Mapping[str, Any]) -> int:
    """Give the study one more trial, with these values (path → value); its number.

    The sampler chooses what ``point`` leaves open. Of trials that are all the sampler's, the oldest
    that waits becomes this one, and the new one is the sampler's: so this is taken before those.
    Call it under :meth:`Store.exclusively`.
    """
    key = _key(_ASKED, point)
    fixed = {attr.GIVEN: sampling.encoded(spec, point)}
    with store.writing() as connection:
        free = connection.execute(_free(study_id)).first()
        if free is None:
            asked = create_trial(
                state=TrialState.WAITING,
                user_attrs={attr.TICKET: key, attr.ATTEMPT: 1},
                system_attrs=fixed,
            )
            (number,) = tables.insert(connection, study_id, [asked])
            return number
        tables.write_attributes(connection, free.trial_id, fixed, {attr.TICKET: key})
        tables.insert(connection, study_id, [_waiting(spec, Ticket(key=_SAMPLER))])
        return int(free.number)


def _free(study_id: int) -> sqlalchemy.Select[Any]:
    """The oldest waiting trial of which nothing is decided yet, held for this transaction.

    Of one whose worker died within the drawing some parameters are."""
    other = FACTS.alias()
    drawn = sqlalchemy.select(other.c.trial_id).where(
        other.c.trial_id == TRIALS.c.trial_id, other.c.key == attr.DRAWN
    )
    begun = sqlalchemy.select(PARAMS.c.trial_id).where(PARAMS.c.trial_id == TRIALS.c.trial_id)
    return (
        sqlalchemy.select(TRIALS.c.trial_id, TRIALS.c.number)
        .join(FACTS, FACTS.c.trial_id == TRIALS.c.trial_id)
        .where(
            TRIALS.c.study_id == study_id,
            TRIALS.c.state == TrialState.WAITING,
            FACTS.c.key == attr.TICKET,
            FACTS.c.value_json == json.dumps(_SAMPLER),
            ~drawn.exists(),
            ~begun.exists(),
        )
        .order_by(TRIALS.c.trial_id)
        .limit(1)
        .with_for_update(skip_locked=True, of=TRIALS)
    )


def known(store: Store, study_id: int, spec: StudySpec, point: Mapping[str, Any]) -> bool:
    """Whether a grid point, a published configuration or an enqueued trial comes to the same.

    What an enqueued one left to the sampler is not known: it is no such trial."""
    wanted = _config(spec, point)
    with store.reading() as connection:
        keys = set(_known_keys(connection, study_id, spec)) - {_SAMPLER}
    whole = (
        _point(key)
        for key in keys
        if not (key.startswith(f"{_ASKED}/") and still_open(spec, _point(key)))
    )
    return wanted is not None and any(_config(spec, known) == wanted for known in whole)


def _config(spec: StudySpec, values: Mapping[str, Any]) -> TrialConfig | None:
    """The configuration of a point, or None for one that no trial can have."""
    try:
        return spec.trial_config(values)
    except ValidationError:
        return None


def fill(store: Store, study_id: int, spec: StudySpec, planned: Sequence[Ticket]) -> int:
    """Enqueue those of ``planned`` that the study does not have yet; the number enqueued.

    A point of a grid and a published configuration that come to the same are one trial, whichever
    was asked for first. Call it under :meth:`Store.exclusively`.
    """
    with store.writing() as connection:
        have = Counter(_known_keys(connection, study_id, spec))
        there = set(have)
        lacking = []
        for ticket in planned:
            if have[ticket.key] > 0:
                have[ticket.key] -= 1
            else:
                lacking.append(ticket)
        if isinstance(spec.search.sampler, Grid) and there and _mixed(there, lacking):
            trained = [_config(spec, _point(key)) for key in there if key != _SAMPLER]
            lacking = [
                ticket
                for ticket in lacking
                if (config := _config(spec, ticket.values or {})) is None or config not in trained
            ]
        trials = [_waiting(spec, ticket) for ticket in lacking]
        return len(tables.insert(connection, study_id, trials))


def _known_keys(connection: sqlalchemy.Connection, study_id: int, spec: StudySpec) -> Iterator[str]:
    """The key of every trial that counts. Older versions numbered published configurations."""
    replaced = recovery.replaced(connection, study_id)
    known = tables.facts(connection, study_id, attr.TICKET)
    numbered = set()
    for number, key in known.items():
        if number in replaced:
            continue
        kind, _, point = key.partition("/")
        if point.isdecimal():
            numbered.add(number)
        else:
            yield _key(kind, json.loads(point)) if point else key
    if numbered:
        query = sqlalchemy.select(TRIALS.c.trial_id).where(
            TRIALS.c.study_id == study_id, TRIALS.c.number.in_(numbered)
        )
        for trial in tables.read(connection, connection.execute(query).scalars()):
            yield _key(_REFERENCE, values(spec, trial))


def _key(kind: str, point: Mapping[str, Any]) -> str:
    return f"{kind}/{json.dumps(_plain(point), sort_keys=True)}"


def _plain(value: Any) -> Any:
    """``value`` in one of the ways in which it can be written: 1.0 is 1."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _point(key: str) -> dict[str, Any]:
    point: dict[str, Any] = json.loads(key.partition("/")[2])
    return point


def _mixed(there: Iterable[str], lacking: Iterable[Ticket]) -> bool:
    """Whether a study has points of a grid and published configurations, or is to have both."""
    kinds = {key.partition("/")[0] for key in (*there, *(ticket.key for ticket in lacking))}
    return {_GRID, _REFERENCE} <= kinds


def _waiting(spec: StudySpec, ticket: Ticket) -> FrozenTrial:
    """Values that the sampler could have drawn become the trial's parameters, the rest ``SET``."""
    attributes: dict[str, Any] = {
        attr.TICKET: ticket.key,
        attr.ATTEMPT: 1,
    }
    if ticket.values is None:
        return create_trial(state=TrialState.WAITING, user_attrs=attributes)
    inside = {
        path: value
        for path, value in ticket.values.items()
        if path in spec.parameters
        and spec.parameters[path].holds(ticket.values)
        and contains(spec.parameters[path], value)
    }
    outside = {path: value for path, value in ticket.values.items() if path not in inside}
    attributes |= {attr.FIXED: True}
    if outside:
        attributes[attr.SET] = outside
    return create_trial(
        state=TrialState.WAITING,
        params=sampling.encoded(spec, inside),
        distributions={path: sampling.distribution(spec.parameters[path]) for path in inside},
        user_attrs=attributes,
    )

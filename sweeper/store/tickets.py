"""A study's plan as waiting trials: which trials it is to have, and enqueueing those it lacks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ValidationError

from sweeper.config import TrialConfig
from sweeper.space import contains, grid
from sweeper.store import attributes as attr
from sweeper.store import recovery, sampling, tables
from sweeper.store.database import Store
from sweeper.study.spec import Grid, ReferenceOnly, StudySpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A trial that the study is to have.

    ``values`` None: the sampler decides; otherwise exactly these. ``key`` says which trial of the
    plan it is; only tickets of the sampler share one.
    """

    key: str
    values: Mapping[str, Any] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


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
        Ticket(key=f"reference/{index}", values=trial.params, attributes={attr.REFERENCE: index})
        for index, trial in enumerate(published)
    ]
    match spec.search.sampler:
        case ReferenceOnly():
            return result
        case Grid():
            points = [
                Ticket(key="grid/" + json.dumps(point, sort_keys=True), values=point)
                for point in grid(spec.parameters)
            ]
            taken = [_config(spec, trial.params) for trial in published]
            return result + [
                ticket
                for ticket in points
                if not taken or _config(spec, ticket.values or {}) not in taken
            ]
    free = Ticket(key="sampler", values=None if spec.parameters else {})
    return result + [free] * (spec.search.trials or 1)


def _config(spec: StudySpec, values: Mapping[str, Any]) -> TrialConfig | None:
    """The configuration of a point, or None for one that no trial can have."""
    try:
        return spec.trial_config(values)
    except ValidationError:
        return None


def fill(store: Store, study_id: int, spec: StudySpec, planned: Sequence[Ticket]) -> int:
    """Enqueue those of ``planned`` that the study does not have yet; the number enqueued.

    Call it under :meth:`Store.exclusively`.
    """
    with store.writing() as connection:
        replaced = recovery.replaced(connection, study_id)
        known = tables.facts(connection, study_id, attr.TICKET)
        have = Counter(key for number, key in known.items() if number not in replaced)
        lacking = []
        for ticket in planned:
            if have[ticket.key] > 0:
                have[ticket.key] -= 1
            else:
                lacking.append(_waiting(spec, ticket))
        return len(tables.insert(connection, study_id, lacking))


def _waiting(spec: StudySpec, ticket: Ticket) -> FrozenTrial:
    """Values that the sampler could have drawn become the trial's parameters, the rest ``SET``."""
    attributes: dict[str, Any] = {
        attr.TICKET: ticket.key,
        attr.ATTEMPT: 1,
        **ticket.attributes,
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

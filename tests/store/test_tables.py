"""Rows written and read in bulk are those that Optuna writes and reads one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeper.store import Store, StoredStudy, tables

Start = Callable[..., StoredStudy]


def trials() -> list[FrozenTrial]:
    """One of every kind, with what is hard to store."""
    options = {
        "b.name": CategoricalDistribution(["sgd", None, True, "[1, 2]"]),
        "a.lr": FloatDistribution(1e-6, 0.1, log=True),
        "c.depth": IntDistribution(1, 9, step=2),
    }
    params = {"b.name": True, "a.lr": 1.2345678901234567e-5, "c.depth": 3}
    infinite = create_trial(
        state=TrialState.COMPLETE,
        value=-math.inf,
        params=params,
        distributions=options,
        intermediate_values={3: math.nan, 1: math.inf, 2: -math.inf, 0: 0.1},
        user_attrs={"a fact": {"é": [1, None]}},
        system_attrs={"rung": 0.5},
    )
    infinite.datetime_start = datetime.now() - timedelta(hours=1)
    waiting = create_trial(state=TrialState.WAITING, user_attrs={"x": 1})
    running = create_trial(state=TrialState.RUNNING, params=params, distributions=options)
    pruned = create_trial(state=TrialState.PRUNED, value=0.25, intermediate_values={7: 0.25})
    return [infinite, waiting, running, pruned, create_trial(state=TrialState.FAIL)]


def test_optuna_reads_what_was_inserted(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    wanted = trials()
    with store.writing() as connection:
        assert tables.insert(connection, study.id, wanted) == [2, 3, 4, 5, 6]
        assert tables.insert(connection, study.id, []) == []
    found = store.backend.get_all_trials(study.id)[2:]
    assert [trial.number for trial in found] == [2, 3, 4, 5, 6]
    for mine, theirs in zip(wanted, found, strict=True):
        for name in ("state", "values", "params", "distributions", "user_attrs", "system_attrs"):
            assert getattr(theirs, name) == getattr(mine, name), name
        assert list(theirs.params) == list(mine.params)
        assert theirs.datetime_start == mine.datetime_start
        assert theirs.datetime_complete == mine.datetime_complete
        assert repr(sorted(theirs.intermediate_values.items())) == repr(
            sorted(mine.intermediate_values.items())
        )


def test_a_read_gives_what_optuna_reads(store: Store, started: Start) -> None:
    study = started(search={"trials": 2})
    with store.writing() as connection:
        tables.insert(connection, study.id, trials())
    theirs = store.backend.get_all_trials(study.id)
    with store.reading() as connection:
        mine = tables.read(connection, [trial._trial_id for trial in theirs])
    assert [repr(trial) for trial in mine] == [repr(trial) for trial in theirs]


def test_facts_of_a_trial_that_ended_stay_as_they_are(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    trial_id = store.backend.get_all_trials(study.id)[0]._trial_id
    with store.writing() as connection:
        tables.write_facts(connection, trial_id, {"a": 1, "b": 2})
        tables.write_facts(connection, trial_id, {"b": [3], "c": None})
    known = store.storage.get_trial(trial_id).user_attrs
    assert (known["a"], known["b"], known["c"]) == (1, [3], None)
    store.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    store.storage.set_trial_state_values(trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError), store.writing() as connection:
        tables.write_facts(connection, trial_id, {"a": 2})
    assert store.storage.get_trial(trial_id).user_attrs["a"] == 1


def test_readers_do_not_wait_for_a_writer(store: Store, started: Start) -> None:
    study = started(search={"trials": 3})
    with store.writing() as writer:
        tables.insert(writer, study.id, trials())
        with store.reading() as reader:
            assert len(tables.facts(reader, study.id, "sweeper.ticket")) == 3

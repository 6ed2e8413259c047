"""A study in figures: the same figures as from all its trials, at a fraction of the reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event, text

from sweeper.store import Outcome, Store, StoredStudy, held, progress, queue, recovery, standing
from sweeper.store import attributes as attr
from sweeper.store.glance import best_value, failed_rows, is_over

Start = Callable[..., StoredStudy]


@contextmanager
def statements(store: Store) -> Iterator[list[str]]:
    """What is sent to the database while the context lasts."""
    found: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        found.append(statement)

    event.listen(store.backend.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(store.backend.engine, "before_cursor_execute", note)


def end(store: Store, study: StoredStudy, outcome: Outcome, value: float = 0.0) -> int:
    claimed = queue.claim(store, study.id, "w")
    assert claimed is not None
    held.report(store, claimed, 1, value)
    held.finish(
        store,
        study.study,
        claimed,
        outcome=outcome,
        values=[value] if outcome is Outcome.COMPLETED else (),
        facts={attr.SECONDS: 4.0, attr.ERROR: "why"},
    )
    return claimed.number


def mixed(store: Store, started: Start, **sections: object) -> StoredStudy:
    """Twelve trials: completed, pruned, crashed, retried, about to be retried, running, waiting."""
    study = started(search={"trials": 12}, **sections)
    for value in (0.5, 0.9, 0.9, 0.1):
        end(store, study, Outcome.COMPLETED, value)
    end(store, study, Outcome.PRUNED)
    end(store, study, Outcome.CRASHED)
    end(store, study, Outcome.OUT_OF_MEMORY)
    with store.exclusively():
        recovery.reconcile(store, study.id, study.spec)
    end(store, study, Outcome.OUT_OF_MEMORY)
    assert queue.claim(store, study.id, "w") is not None
    return study


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_figures_are_those_of_all_trials(store: Store, started: Start, direction: str) -> None:
    study = mixed(store, started, objective={"metric": "val_loss", "direction": direction})
    now, whole = progress(store, study), standing(store, study)
    assert now.counts == whole.counts
    assert now.outcomes == whole.outcomes
    assert (now.budget, now.ended, now.over) == (whole.budget, whole.ended, whole.over)
    assert now.due == len(whole.due) == 1
    assert now.best == whole.best
    assert now.best is not None
    assert best_value(store, study) == now.best.values[0]
    assert now.running == tuple(row for row in whole.rows if row.state == "running")
    assert failed_rows(store, study) == [row for row in whole.rows if row.state == "failed"]
    assert now.mean_seconds == 4.0
    assert is_over(store, study) is whole.over is False


def test_an_empty_study_has_no_best(store: Store, started: Start) -> None:
    study = started(search={"trials": 1})
    now = progress(store, study)
    assert (now.best, now.mean_seconds, now.over, now.budget) == (None, None, False, 1)
    assert best_value(store, study) is None
    end(store, study, Outcome.COMPLETED, 1.0)
    assert is_over(store, study)
    assert progress(store, study).over


def test_a_trial_that_is_to_be_tried_again_keeps_a_study_going(
    store: Store, started: Start
) -> None:
    study = started(search={"trials": 1})
    end(store, study, Outcome.OUT_OF_MEMORY)
    assert not is_over(store, study)
    assert recovery.any_due(store, study.id, study.spec)
    with store.exclusively():
        recovery.reconcile(store, study.id, study.spec)
    assert not recovery.any_due(store, study.id, study.spec)


def test_news_is_what_ended_since(store: Store, started: Start) -> None:
    study = started(search={"trials": 4})
    end(store, study, Outcome.COMPLETED, 1.0)
    first = progress(store, study)
    assert first.news == ()
    end(store, study, Outcome.PRUNED)
    end(store, study, Outcome.OUT_OF_MEMORY)
    second = progress(store, study, since=first)
    assert [(row.number, row.state) for row in second.news] == [(1, "pruned"), (2, "waiting")]
    assert progress(store, study, since=second).news == ()


def test_neither_a_look_nor_a_claim_costs_more_queries_for_more_trials(
    store: Store, started: Start
) -> None:
    costs = []
    for index, count in enumerate((3, 60)):
        study = started(name=f"s{index}", search={"trials": count})
        end(store, study, Outcome.COMPLETED, 1.0)
        with statements(store) as looked:
            progress(store, study)
        with statements(store) as claimed:
            queue.claim(store, study.id, "w")
        costs.append((len(looked), len(claimed)))
    assert costs[0] == costs[1]
    assert costs[0][1] <= 6


def test_the_oldest_waiting_trial_is_found_without_looking_at_others(
    store: Store, started: Start
) -> None:
    study = started(search={"trials": 3})
    query = (
        f"SELECT trial_id FROM trials WHERE study_id = {study.id} AND state = 'WAITING' "
        "ORDER BY trial_id LIMIT 1"
    )
    with store.writing() as connection:
        if connection.dialect.name == "sqlite":
            plan = connection.execute(text(f"EXPLAIN QUERY PLAN {query}"))
        else:
            connection.execute(text("SET LOCAL enable_seqscan = off"))  # three trials fit on a page
            plan = connection.execute(text(f"EXPLAIN {query}"))
        steps = " ".join(str(row) for row in plan)
    assert "sweeper_trials_by_state" in steps
    assert "sort" not in steps.lower()
    assert "TEMP B-TREE" not in steps


def test_enqueueing_more_trials_takes_no_more_statements(store: Store, started: Start) -> None:
    costs = []
    for index, count in enumerate((3, 60)):
        with statements(store) as sent:
            started(name=f"s{index}", search={"trials": count})
        costs.append(len([each for each in sent if each.startswith("INSERT INTO trial")]))
    assert costs[0] == costs[1] == 2  # trials and their attributes

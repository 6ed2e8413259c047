"""Whether a study has come to what its file calls enough (``search.stop``)."""

from __future__ import annotations

from sweeper.store import studies
from sweeper.store.attributes import Control
from sweeper.store.database import Store
from sweeper.store.glance import Progress, ended_since_best
from sweeper.store.studies import StoredStudy


def stop_if_enough(store: Store, study: StoredStudy, now: Progress) -> str:
    """Ask the study's workers to begin no further trial if it has enough; why, else nothing.

    Whoever looks may do this, twice or at once with another. What counts is the study's spec as the
    store has it: another launch may have changed that. A study that was asked for something else is
    left alone.
    """
    if now.over or not _reason(store, study, now):
        return ""
    reason = _reason(store, studies.load(store, study.name), now)
    if reason and studies.control(store, study.id) is Control.RUN:
        studies.ask(store, study.id, Control.STOP, why=reason)
    return reason


def _reason(store: Store, study: StoredStudy, now: Progress) -> str:
    found = _found(store, study, now)
    return f"{found}; to go on, launch it with another search.stop" if found else ""


def _found(store: Store, study: StoredStudy, now: Progress) -> str:
    stop, objective = study.spec.search.stop, study.spec.objective[0]
    if stop.failures is not None and now.counts["failed"] >= stop.failures:
        return f"{now.counts['failed']} trials have failed (search.stop.failures: {stop.failures})"
    if now.best is None:
        return ""
    value, name = now.best.values[0], f"{objective.metric} of trial {now.best.number}"
    if stop.target is not None and (
        value >= stop.target if objective.maximize else value <= stop.target
    ):
        return f"{name} is {value:.4g} (search.stop.target: {stop.target:g})"
    if stop.patience is not None and (count := ended_since_best(store, study)) >= stop.patience:
        return (
            f"{count} trials have ended since the {name} was {value:.4g}, and none was better "
            f"(search.stop.patience: {stop.patience})"
        )
    return ""

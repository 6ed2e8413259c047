"""The user attributes that sweeper keeps with Optuna's studies and trials, in one place.

Facts only: a trial's state is Optuna's ``TrialState`` and nothing mirrors it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

# of a study
SPEC: Final = "sweeper.spec"
CONTROL: Final = "sweeper.control"
CREATED: Final = "sweeper.created"
STOPPED: Final = "sweeper.stopped"
FINISHED: Final = "sweeper.finished"

# of a trial, written when it is enqueued
TICKET: Final = "sweeper.ticket"
FIXED: Final = "sweeper.fixed"
SET: Final = "sweeper.set"
ATTEMPT: Final = "sweeper.attempt"
RETRY_OF: Final = "sweeper.retry_of"
ORIGIN: Final = "sweeper.origin"
FAILURES: Final = "sweeper.failures"
GIVEN: Final = "fixed_params"
"""Optuna's own system attribute: values that its samplers are not asked for."""

# of a trial, written by the worker that has it
WORKER: Final = "sweeper.worker"
DRAWN: Final = "sweeper.drawn"
RUN_ID: Final = "sweeper.run_id"
ALONE: Final = "sweeper.alone"
PRUNED_AFTER: Final = "sweeper.pruned_after"
PARAMETERS: Final = "sweeper.model_parameters"

# of a trial, written as it ends
OUTCOME: Final = "sweeper.outcome"
METRICS: Final = "sweeper.metrics"
ERROR: Final = "sweeper.error"
SECONDS: Final = "sweeper.seconds"


class Outcome(StrEnum):
    """What ended a trial (design decision 9)."""

    COMPLETED = "completed"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"
    INVALID = "invalid"
    LOST = "lost"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"


class Control(StrEnum):
    """What a study's workers are asked to do."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"
    CANCEL = "cancel"

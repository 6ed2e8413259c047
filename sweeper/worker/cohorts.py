"""Whether a trial trains alone or with others, and how many fit beside it.

A worker trains up to ``resources.cohort`` trials at once: those of the same structure as one batch,
others beside them, each with a captured step and a stream of its own (`sweeper.training.crew`).
With ``auto`` what is the fastest for a structure on this device is measured and remembered; every
trial then takes its share of the device, and a worker takes trials until it is full. Where memory
does not suffice, half of the trials go on, and so many is the most from then on: while they and
those that follow train, and later in any company that has the same structures in it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from sweeper.worker.compiling import going_by
from sweeper.worker.work import Work

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    import torch

    from sweeper.config import TrialConfig
    from sweeper.store import StoredStudy
    from sweeper.training.cohort import Choice
    from sweeper.worker.attempt import Attempt
    from sweeper.worker.loop import Worker
    from sweeper.worker.together import Together

_log = logging.getLogger(__name__)
_MEASURED_AT_MOST: Final = 3
"""So many structures of one study does a worker measure; more of them are taken to be like the
last one. A space with a structure for every trial would otherwise be measured all the time."""
_TIMED: Final = frozenset({"seconds", "samples_per_s", "peak_memory_mib"})
"""Objectives that companions would change."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory did not suffice, the device's or the host's, also for capturing a step."""
    if type(error).__name__ == "CaptureError":  # ending a broken capture raises once more
        while error is not None and (error.__cause__ or error.__context__):
            error = error.__cause__ or error.__context__
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def fuses_by_itself(device: torch.device) -> bool:
    """Whether ``cohort: auto`` may be more than one. On a CPU one at a time is the fastest."""
    return device.type != "cpu"


def measured_choice(
    worker: Worker, study: StoredStudy, config: TrialConfig, device: torch.device, most: float
) -> Choice:
    """The way and the number that are the fastest for this structure on this device, of at most so
    many as this worker will have."""
    from sweeper.training.cohort import best_way

    return best_way(
        config,
        dataset=worker.loaded(config),
        device=device,
        file=worker.settings.cohort_sizes,
        compiling=going_by(worker.settings, study.spec),
        most=most,
        stop=lambda: worker.signals.stopping,
    )


def known_choice(
    worker: Worker, study: StoredStudy, config: TrialConfig, device: torch.device, most: float
) -> Choice | None:
    """As :func:`measured_choice` where it was measured before, else None."""
    from sweeper.training.cohort import known_way

    return known_way(
        config,
        device=device,
        file=worker.settings.cohort_sizes,
        compiling=going_by(worker.settings, study.spec),
        most=most,
    )


@dataclass(kw_only=True)
class Cohorts:
    """Which trials a worker trains together, and what it has learnt of their structures.

    ``limits``: how many fitted into memory, by the structures that were there; 1 after a crash.
    ``_shares``: how many trials of a study were this worker's to train when it last looked.
    """

    worker: Worker
    work: Work
    limits: dict[frozenset[str], int] = field(default_factory=dict)
    _chosen: dict[int, dict[str, Choice]] = field(default_factory=dict)
    _shares: dict[int, float] = field(default_factory=dict)

    def around(self, attempt: Attempt) -> Together | None:
        """Company for the trial, or None where it trains alone; the log says why.

        Raises what loading its data raises, and ValidationError for values that do not fit.
        """
        wanted = attempt.study.spec.resources.cohort
        if wanted == 1:
            return None
        from sweeper.training import best_device
        from sweeper.worker.together import Together

        if wanted == "auto" and not fuses_by_itself(best_device()):
            return None
        config = attempt.configured()
        reason = self.why_by_itself(attempt, config)
        if reason is None and wanted == "auto":
            share = self.work.share(attempt.study)
            self._note_share(attempt.study, math.inf if share is None else share)
            reason = "no other trial is known to come" if share == 1 else None
        if reason is None:
            choice = self.choice(attempt.study, config, measure=True)
            if max(choice.size, choice.beside) > 1:
                return Together(cohorts=self, study=attempt.study)
            reason = "one at a time is the fastest here"
        _log.info("trial %d trains alone: %s", attempt.claimed.number, reason)
        attempt.alone_because = reason
        return None

    def why_by_itself(self, attempt: Attempt, config: TrialConfig) -> str | None:
        """Why the trial must have no company, or None if it may."""
        from sweeper.training import best_device
        from sweeper.training.cohort import structure, why_not_beside

        timed = {each.metric for each in attempt.study.spec.objective} & _TIMED
        if attempt.claimed.alone or self.limits.get(frozenset({structure(config)})) == 1:
            return "one of its structure broke beside others or did not fit"
        if timed:
            return f"the objective {', '.join(sorted(timed))} depends on what runs beside it"
        return why_not_beside(config, best_device())

    def choice(self, study: StoredStudy, config: TrialConfig, *, measure: bool) -> Choice:
        """How many of this structure train at once, and in which way.

        Without ``measure``, what is not known is taken to be as for the last structure measured.
        """
        from sweeper.training import best_device
        from sweeper.training.cohort import Choice, structure

        wanted = study.spec.resources.cohort
        if wanted != "auto":
            return Choice(way="cohort", size=wanted, beside=wanted)
        chosen = self._chosen.setdefault(study.id, {})
        kind, device = structure(config), best_device()
        most = self._shares.get(study.id, math.inf)
        found = chosen.get(kind) or known_choice(self.worker, study, config, device, most)
        if found is None and chosen and not (measure and len(chosen) < _MEASURED_AT_MOST):
            return list(chosen.values())[-1]
        chosen[kind] = found or measured_choice(self.worker, study, config, device, most)
        return chosen[kind]

    def _note_share(self, study: StoredStudy, share: float) -> None:
        """Of a study that has grown, what was found the fastest may be so no more."""
        if share > self._shares.get(study.id, math.inf):
            self._chosen.pop(study.id, None)
        self._shares[study.id] = share

    def limit(self, kinds: Collection[str]) -> int | None:
        """How many may train at once in a company of these structures, None where nothing is known
        against any number."""
        there = frozenset(kinds)
        return min((most for some, most in self.limits.items() if some <= there), default=None)

    def remember_limit(self, kinds: Iterable[str], most: int) -> None:
        """No more than this fitted where these structures were there."""
        self.limits[frozenset(kinds)] = most

"""Trials that a worker trains together: which of them, and who is next.

Nothing here decides what a trial is: a cohort takes what the queue has. Trials whose values are
known before they run (grid points, published configurations, trials begun before) are looked
through for those of the same structure. Where the sampler decides, trials are drawn one after the
other in the order of the queue, exactly as without cohorts; the first one of another structure
stays with this worker, is trained as soon as the cohort is done, and nothing is drawn until then.
So no trial is drawn and put back (which would count as an attempt and leave values in the queue
that the sampler chose for an earlier moment), and at most one is drawn before its turn.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from sweeper import settings as names
from sweeper.errors import StoreRefusedError, StoreUnreachableError
from sweeper.space import structural
from sweeper.store import Outcome, StoredStudy, queue
from sweeper.study.spec import Grid, ReferenceOnly
from sweeper.worker.work import Work

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    import torch

    from sweeper.config import TrialConfig
    from sweeper.measurement import Measurement
    from sweeper.training.cohort import Cohort, Member
    from sweeper.worker.attempt import Attempt
    from sweeper.worker.loop import Worker

_log = logging.getLogger(__name__)
_LOOK_AGAIN_S: Final = 2.0
"""With slots free and nothing found, the queue is looked at again after so long."""
_TIMED: Final = frozenset({"seconds", "samples_per_s", "peak_memory_mib"})
"""Objectives that companions would change."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, the device's or the host's."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def fuses_by_itself(device: torch.device) -> bool:
    """Whether ``cohort: auto`` may be more than one. On a CPU cohorts are slower than workers."""
    return device.type != "cpu"


def measured_size(worker: Worker, config: TrialConfig, device: torch.device) -> int:
    """The number of trials at once that is the fastest for this structure on this device."""
    from sweeper.training.cohort import best_size

    file = worker.settings.cohort_sizes
    return best_size(config, dataset=worker.loaded(config), device=device, file=file)


@dataclass(kw_only=True)
class Cohorts:
    """Which trials a worker trains together, and what it has learnt of their structures.

    ``limits``: the number that fitted into memory, by structure; 1 after a crash.
    """

    worker: Worker
    work: Work
    limits: dict[str, int] = field(default_factory=dict)

    def around(self, attempt: Attempt) -> Together | None:
        """A cohort for the trial, or None where it trains alone; the log says why.

        Raises what loading its data raises, and ValidationError for values that do not fit.
        """
        wanted = attempt.study.spec.resources.cohort
        if wanted == 1:
            return None
        from sweeper.training import best_device
        from sweeper.training.cohort import structure, why_alone

        device = best_device()
        if wanted == "auto" and not fuses_by_itself(device):
            return None
        config = attempt.configured()
        kind = structure(config)
        together = Together(cohorts=self, study=attempt.study, kind=kind, limit=1)
        timed = {each.metric for each in attempt.study.spec.objective} & _TIMED
        reason = why_alone(config, device)
        if attempt.claimed.alone or self.limits.get(kind) == 1:
            reason = "a cohort of its structure broke or did not fit"
        elif timed:
            reason = f"the objective {', '.join(sorted(timed))} depends on what runs beside it"
        elif reason is None and wanted == "auto" and not self._company(together):
            reason = "no other trial of its structure is known to come"
        size = 1
        if reason is None:
            size = measured_size(self.worker, config, device) if wanted == "auto" else wanted
            size = min(size, self.limits.get(kind, size))
            reason = "one at a time is the fastest here" if size == 1 else None
        if reason is not None:
            _log.info("trial %d trains alone: %s", attempt.claimed.number, reason)
            attempt.alone_because = reason
            return None
        together.limit = size
        return together

    def _company(self, together: Together) -> bool:
        """Whether it is worth measuring how many at once are the fastest."""
        study = together.study
        if not any(structural(path) for path in study.spec.parameters):
            return True
        return self.work.fits_any(study, together.fits)


@dataclass(kw_only=True)
class Together:
    """One cohort of a worker, from its first trial to its last.

    ``kind`` is the structure of its members and ``limit`` the most it may have, 0 once it broke.
    ``next`` is a trial of another structure that was drawn on the way.
    """

    cohorts: Cohorts
    study: StoredStudy
    kind: str
    limit: int
    next: Attempt | None = None
    attempts: dict[Member, Attempt] = field(default_factory=dict)
    _name: str = ""
    _cohort: Cohort | None = None
    _fitting: dict[str, bool] = field(default_factory=dict)
    _look_at: float = 0.0

    @property
    def worker(self) -> Worker:
        return self.cohorts.worker

    def run(self, leader: Attempt) -> Attempt | None:
        """Train until nobody is left; the trial of another structure that comes next, or None.

        Only what no trial survives is raised, and then all trials are back in the queue.
        """
        try:
            self._name = names.cohort_name(self.worker.name, leader.claimed.number)
            self._join(leader)
            while self._cohort is not None and not self._stopped():
                self._fill()
                if not self.attempts:
                    break
                self._conclude(self._epoch(self._cohort))
        except BaseException:
            self._all_back()
            if self.next is not None:
                self.next.give_back()
                self.next.close()
            raise
        finally:
            if self._cohort is not None:
                self._cohort.close()
        return self.next

    def _stopped(self) -> bool:
        """After a signal: give all back, each with a checkpoint."""
        if self.worker.signals.stopping:
            self._all_back()
        return self.worker.signals.stopping

    def _join(self, attempt: Attempt) -> None:
        """Make the trial a member, or the next one where its structure is another."""
        from sweeper.training import best_device
        from sweeper.training.cohort import Cohort, structure

        member: Member | None = None
        try:
            with self.worker.fate_of(attempt):
                config = attempt.configured()
                if structure(config) != self.kind or attempt.claimed.alone:
                    self.next = attempt
                    return
                attempt.cohort = self._name
                attempt.announce()
                dataset = self.worker.loaded(config)
                if self._cohort is None:
                    self._cohort = Cohort(config, dataset=dataset, device=best_device())
                member = self._cohort.join(config, objective=attempt.by)
                attempt.begin(member)
                if member.finished:
                    attempt.end(member, Outcome.COMPLETED)
                else:
                    self.attempts[member] = attempt
        finally:
            if attempt is not self.next and attempt not in self.attempts.values():
                attempt.close()
                if member is not None:
                    member.close()

    def _fill(self) -> None:
        """Take trials of the same structure from the queue until the cohort is full.

        An empty cohort is filled again, its memory and its captured step are there; but the trial
        that was drawn ahead is not kept waiting for that.
        """
        if self.attempts and time.monotonic() < self._look_at:
            return
        if self.next is not None and not self.attempts:
            return
        share: int | None = None
        with self._store_may_be_away():
            share = self.cohorts.work.share(self.study)
        limit = self.limit if share is None else min(self.limit, max(share, 1))
        drawn = not isinstance(self.study.spec.search.sampler, Grid | ReferenceOnly)
        while len(self.attempts) < limit and not self.worker.signals.stopping:
            claimed = self._claimed(drawn=drawn and self.next is None)
            if claimed is None:
                self._look_at = time.monotonic() + _LOOK_AGAIN_S
                return
            self._join(self.worker.taken(self.study, claimed))

    def _claimed(self, *, drawn: bool) -> queue.Claim | None:
        """The next trial for this cohort."""
        work, found = self.cohorts.work, None
        with self._store_may_be_away():
            found = work.another_where(self.study, self.fits)
            if found is None and drawn:
                found = work.another(self.study)
        return found

    @contextlib.contextmanager
    def _store_may_be_away(self) -> Iterator[None]:
        """Members train on where the store does not answer."""
        try:
            yield
        except StoreRefusedError:
            raise
        except StoreUnreachableError as error:
            _log.warning("the store does not answer, the cohort trains on: %s", error)

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial of these values has the structure; worked out once for each structure."""
        from sweeper.training.cohort import structure

        deciding = {path: value for path, value in values.items() if structural(path)}
        key = json.dumps(deciding, sort_keys=True, default=repr)
        if key not in self._fitting:
            try:
                config = self.study.spec.trial_config(values)
            except ValidationError:
                return False
            self._fitting[key] = structure(config) == self.kind
        return self._fitting[key]

    def _epoch(self, cohort: Cohort) -> list[tuple[Member, Measurement]]:
        """One epoch of all; empty where it broke, and who is left then can go on."""
        from sweeper.training import Interrupted

        try:
            return cohort.epoch(interrupt=lambda: self.worker.out_of_time(self.study))
        except Interrupted:
            self._all_back()
            return []
        except Exception as error:  # noqa: BLE001 - a trial that crashes alone says with what
            if not out_of_memory(error):
                self._separate(traceback.format_exc())
                return []
            reason = str(error)
        # Out here nothing of the traceback holds memory any more.
        self._halve(reason)
        return []

    def _conclude(self, measured: list[tuple[Member, Measurement]]) -> None:
        """Say what the epoch gave, and end those that are over."""
        throughput = sum(each.metrics.get("samples_per_s", 0.0) for _, each in measured)
        self.worker.note_throughput(throughput or None)
        ended: list[tuple[Member, Outcome]] = []
        for member, measurement in measured:
            attempt, over = self.attempts[member], True
            with self.worker.fate_of(attempt):
                outcome = attempt.measured(member, measurement)
                over = False
            if over:
                self._release(member)
            elif outcome is not None:
                ended.append((member, outcome))
        self._test([member for member, outcome in ended if outcome is Outcome.COMPLETED])
        for member, outcome in ended:
            with self.worker.fate_of(self.attempts[member]):
                self.attempts[member].end(member, outcome)
            self._release(member)

    def _test(self, members: list[Member]) -> None:
        """Read the test set for several at once; where that does not work, each does it itself."""
        if self._cohort is None or len(members) < 2:
            return
        try:
            self._cohort.test(members)
        except Exception as error:  # noqa: BLE001 - raised again by the member that is to blame
            _log.warning("the test set is read trial by trial: %s", error)

    def _halve(self, reason: str) -> None:
        """Keep half of the members, those that train the longest; the others go back."""
        kept = len(self.attempts) // 2
        self.worker.free_memory()
        if not kept:
            for member, attempt in list(self.attempts.items()):
                self.worker.run_out_of_memory(attempt, reason)
                self._release(member)
            self.cohorts.limits[self.kind], self.limit = 1, 0
            return
        _log.warning("memory is too small for %d trials, %d go on: %s", kept * 2, kept, reason)
        self.limit = self.cohorts.limits[self.kind] = kept
        self._back(list(self.attempts)[kept:])
        self.worker.free_memory()

    def _separate(self, error: str) -> None:
        """A crash hit all: each of them is to train alone, and the guilty one will crash again."""
        _log.error("the cohort broke, its trials are trained one by one: %s", error)
        self.cohorts.limits[self.kind], self.limit = 1, 0
        self._back(list(self.attempts), alone=True)

    def _all_back(self) -> None:
        self._back(list(self.attempts))

    def _back(self, members: list[Member], *, alone: bool = False) -> None:
        """Put trials back, each with a checkpoint after its last epoch; these are written first."""
        for member in members:
            self.attempts[member].save(member)
        for member in members:
            try:
                self.attempts[member].give_back(alone=alone)
            finally:
                self._release(member)

    def _release(self, member: Member) -> None:
        self.attempts.pop(member).close()
        member.close()

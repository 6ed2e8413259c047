"""Trials that a worker trains together, from the first to the last.

Nothing here decides what a trial is: a worker takes what the queue has. Trials whose values are
known before they run (grid points, published configurations, trials begun before) are looked
through for those that share a structure with one in training; then comes, as long as there is room
beside, whatever is next in the queue, exactly as without company. Where a trial was drawn for which
there is no room, or that has to train alone, it stays with this worker and is trained as soon as
the others are done, and nothing is drawn until then. So no trial is drawn and put back (which would
count as an attempt and leave values in the queue that the sampler chose for an earlier moment), and
at most one is drawn before its turn.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from sweeper import settings as names
from sweeper.errors import StoreRefusedError, StoreUnreachableError
from sweeper.store import Outcome, StoredStudy, queue
from sweeper.study.spec import Grid, ReferenceOnly
from sweeper.worker.attempt import Attempt
from sweeper.worker.cohorts import Cohorts, out_of_memory
from sweeper.worker.compiling import going_by
from sweeper.worker.room import Room

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    from sweeper.config import TrialConfig
    from sweeper.data import Dataset
    from sweeper.measurement import Measurement
    from sweeper.training.crew import Crew
    from sweeper.training.network import NetworkTrial
    from sweeper.worker.loop import Worker

_log = logging.getLogger(__name__)
_LOOK_AGAIN_S: Final = 2.0
"""With room left and nothing found, the queue is looked at again after so long."""

T = TypeVar("T")


@dataclass(kw_only=True)
class Together:
    """The company of one worker.

    ``next`` is a trial without room that was drawn on the way.
    """

    cohorts: Cohorts
    study: StoredStudy
    next: Attempt | None = None
    attempts: dict[NetworkTrial, Attempt] = field(default_factory=dict)
    crew: Crew = field(init=False)
    room: Room = field(init=False)
    _batches: dict[str, str] = field(default_factory=dict)
    _rates: dict[NetworkTrial, float] = field(default_factory=dict)
    _look_at: float = 0.0
    _over: bool = False

    @property
    def worker(self) -> Worker:
        return self.cohorts.worker

    def run(self, leader: Attempt) -> Attempt | None:
        """Train until nobody is left; the trial without room that comes next, or None.

        Only what no trial survives is raised, and then all trials are back in the queue.
        """
        from sweeper.training import best_device
        from sweeper.training.crew import Crew

        compiling = going_by(self.worker.settings, self.study.spec)
        self.crew = Crew(best_device(), compiling=compiling)
        self.room = Room(cohorts=self.cohorts, study=self.study, crew=self.crew)
        try:
            self._join(leader)
            while not self._over and not self.worker.signals.stopping:
                self._fill()
                if not self.attempts:
                    break
                self._conclude(self._epoch())
            if self.worker.signals.stopping:
                self._stop()
        except BaseException:
            self._all_back()
            if self.next is not None:
                self.next.give_back()
                self.next.close()
            raise
        finally:
            self.crew.close()
        return self.next

    def _stop(self) -> None:
        """After a signal: end the epochs that run, then give all back, each with a checkpoint."""
        while self.crew.running:
            self._conclude(self._epoch())
        self._all_back()

    def _join(self, attempt: Attempt) -> None:
        """Train the trial with the others, or make it the next one where that cannot be."""
        member: NetworkTrial | None = None
        full: str | None = None
        try:
            with self.worker.fate_of(attempt):
                config = attempt.configured()
                if not self.room.admits(attempt):
                    if self.next is not None:  # the other one was drawn before
                        attempt.give_back()
                    else:
                        self.next = attempt
                    return
                try:
                    member = self._begun(attempt, config)
                except Exception as error:
                    if not self.attempts or not out_of_memory(error):
                        raise
                    full = str(error)
                if member is not None:
                    if member.finished:
                        attempt.end(member, Outcome.COMPLETED)
                    else:
                        self.attempts[member] = attempt
                        self._introduce(member)
            if full is not None:
                self._too_full(attempt, full)
        finally:
            if attempt is not self.next and attempt not in self.attempts.values():
                attempt.close()
                if member is not None:
                    member.close()
                self.crew.tidy()

    def _begun(self, attempt: Attempt, config: TrialConfig) -> NetworkTrial:
        """The trial as a member, after its last epoch."""
        from sweeper.training.cohort import structure

        kind, way = structure(config), self.room.choice(config).way
        if way == "cohort":
            name = names.cohort_name(self.worker.name, attempt.claimed.number)
            attempt.cohort = self._batches.setdefault(kind, name)
        attempt.announce()
        member = self.crew.join(
            config, dataset=self._dataset(config), objective=attempt.by, way=way
        )
        try:
            attempt.begin(member)
        except BaseException:
            member.close()
            raise
        return member

    def _dataset(self, config: TrialConfig) -> Dataset:
        """The data of another member where they are the same, so that they are there once."""
        for member in self.attempts:
            if member.config.data == config.data:
                return member.dataset
        return self.worker.loaded(config)

    def _introduce(self, member: NetworkTrial) -> None:
        """Write down who trains beside whom."""
        mates, others = self.crew.beside(member)
        attempt = self.attempts[member]
        for there, how in ((mates, attempt.mates), (others, attempt.beside)):
            how.update(self.attempts[one].claimed.number for one in there if one in self.attempts)
        for one in mates:
            self.attempts[one].mates.add(attempt.claimed.number)
        for one in others:
            self.attempts[one].beside.add(attempt.claimed.number)
        if mates or others:
            _log.info("trial %d trains %s", attempt.claimed.number, attempt.company)

    def _too_full(self, attempt: Attempt, reason: str) -> None:
        """There was no memory for one more: it goes back, and the others go on."""
        number, many = attempt.claimed.number, len(self.attempts)
        _log.warning("memory is too small for trial %d beside %d: %s", number, many, reason)
        from sweeper.training.cohort import structure

        self.room.limit_to(many, {*self.room.kinds(), structure(attempt.configured())})
        attempt.give_back()
        self.crew.tidy()
        self.worker.free_memory()

    def _fill(self) -> None:
        """Take trials from the queue until there is no room.

        A cohort that has become empty is filled again, its memory and its captured step are there;
        but the trial that was drawn ahead is not kept waiting for that.
        """
        if self.attempts and time.monotonic() < self._look_at:
            return
        if self.next is not None and not self.attempts:
            return
        if self.next is not None and self.room.admits(self.next):
            attempt, self.next = self.next, None
            self._join(attempt)
        share: int | None = None
        with self._store_may_be_away():
            share = self.cohorts.work.share(self.study)
        most = None if share is None else max(share, 1)
        while not self.worker.signals.stopping and (self.attempts or self.next is None):
            if most is not None and len(self.attempts) >= most:
                break
            welcome = self.room.welcome()
            beside = self.room.has_for(None)
            if not welcome and not beside:
                break
            claimed = self._claimed(welcome, beside=beside)
            if claimed is None:
                self._look_at = time.monotonic() + _LOOK_AGAIN_S
                break
            self._join(self.worker.taken(self.study, claimed))
        self.crew.tidy()
        there = self.room.kinds()
        self._batches = {kind: name for kind, name in self._batches.items() if kind in there}

    def _claimed(self, welcome: set[str], *, beside: bool) -> queue.Claim | None:
        """The next trial: one of these structures, else the next of the queue, unless one was
        drawn already, or neither its values nor its structure are open any more."""
        drawn = not isinstance(self.study.spec.search.sampler, Grid | ReferenceOnly)
        work, found = self.cohorts.work, None
        with self._store_may_be_away():
            found = work.another_where(
                self.study, lambda values: self.room.structure_of(values) in welcome
            )
            if found is None and (drawn or beside) and self.next is None:
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
            _log.warning("the store does not answer, the trials train on: %s", error)

    def _epoch(self) -> list[tuple[NetworkTrial, Measurement]]:
        """What those measured that are the first to finish an epoch; empty where one broke, and
        who is left then can go on."""
        from sweeper.training import Interrupted
        from sweeper.training.crew import LaneBrokenError

        try:
            return self.crew.epoch(
                interrupt=lambda: self.worker.out_of_time(self.study),
                begin=not self.worker.signals.stopping,
            )
        except Interrupted:
            self._all_back()
            return []
        except LaneBrokenError as error:
            cause, members = error.__cause__, list(error.members)
            too_large = out_of_memory(cause)
            reason = str(cause) if too_large else "".join(traceback.format_exception(cause))
            del cause
        # Out here nothing of the traceback holds memory any more.
        if too_large:
            self._halve(reason)
        else:
            self._separate(members, reason)
        return []

    def _conclude(self, measured: list[tuple[NetworkTrial, Measurement]]) -> None:
        """Say what the epoch gave, and end those that are over."""
        for member, measurement in measured:
            self.attempts[member].record(measurement)  # all of them, before anything waits
            self._rates[member] = measurement.metrics.get("samples_per_s", 0.0)
        self.worker.note_throughput(sum(self._rates.values()) or None)
        told = self._each([member for member, _ in measured], Attempt.told)
        found = self._each([member for member, _ in told], Attempt.measured)
        ended = [(member, outcome) for member, outcome in found if outcome is not None]
        self._test([member for member, outcome in ended if outcome is Outcome.COMPLETED])
        for member, outcome in ended:
            with self.worker.fate_of(self.attempts[member]):
                self.attempts[member].end(member, outcome)
            self._release(member)

    def _each(
        self, members: list[NetworkTrial], act: Callable[[Attempt, NetworkTrial], T]
    ) -> list[tuple[NetworkTrial, T]]:
        """Do the same with each of them; what it gave, of those that it was not the end of."""
        done: list[tuple[NetworkTrial, T]] = []
        for member in members:
            over = True
            with self.worker.fate_of(self.attempts[member]):
                done.append((member, act(self.attempts[member], member)))
                over = False
            if over:
                self._release(member)
        return done

    def _test(self, members: list[NetworkTrial]) -> None:
        """Read the test set for several at once; where that does not work, each does it itself."""
        try:
            self.crew.test(members)
        except Exception as error:  # noqa: BLE001 - raised again by the member that is to blame
            _log.warning("the test set is read trial by trial: %s", error)

    def _halve(self, reason: str) -> None:
        """Keep half of the members, those that train the longest; the others go back."""
        kinds, there = self.room.kinds(), list(self.attempts)
        kept = len(there) // 2
        self.worker.free_memory()
        self.room.limit_to(max(kept, 1), kinds)
        if not kept:
            for member in there:
                self.worker.run_out_of_memory(self.attempts[member], reason)
                self._release(member)
            self._over = True
            return
        _log.warning("memory is too small for %d trials, %d go on: %s", kept * 2, kept, reason)
        self._back(there[kept:])
        self.crew.tidy()
        self.worker.free_memory()

    def _separate(self, members: list[NetworkTrial], error: str) -> None:
        """A crash hit all in one batch: each of them is to train alone, and the guilty one will
        crash again. So is one in a lane of its own: on a GPU the fault may be another one's."""
        kinds = {kind for kind in map(self._structure, members) if kind}
        for kind in kinds:
            self.cohorts.remember_limit({kind}, 1)
        if len(members) > 1:
            _log.error("the cohort broke, its trials are trained one by one: %s", error)
        else:
            number = self.attempts[members[0]].claimed.number
            _log.error("trial %d broke beside others, it is trained by itself: %s", number, error)
        self._back(members, alone=True)
        self.crew.tidy()

    def _structure(self, member: NetworkTrial) -> str:
        from sweeper.training.cohort import structure

        return structure(member.config)

    def _all_back(self) -> None:
        self._back(list(self.attempts))

    def _back(self, members: list[NetworkTrial], *, alone: bool = False) -> None:
        """Put trials back, each with a checkpoint after its last epoch; these are written first."""
        self.crew.rewind(members)
        for member in members:
            self.attempts[member].save(member)
        for member in members:
            try:
                self.attempts[member].give_back(alone=alone)
            finally:
                self._release(member)

    def _release(self, member: NetworkTrial) -> None:
        self._rates.pop(member, None)
        self.attempts.pop(member).close()
        member.close()

"""A crew: trials of any structure that train side by side in one process, each in its own time.

Every trial is in a lane (`sweeper.training.lanes`): by itself, with the engine that it would have
alone, or in a cohort (`sweeper.training.cohort`) with others of its structure. What it gets is what
it would get alone. An epoch of the crew is over as soon as any lane has finished one, so that fast
trials never wait for slow ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sweeper.config import TrialConfig
from sweeper.data import Dataset
from sweeper.errors import SweeperError, UsageError
from sweeper.measurement import Measurement
from sweeper.training.base import Interrupt, Poll
from sweeper.training.cohort.members import Cohort
from sweeper.training.cohort.rules import Way, structure, why_alone, why_not_beside
from sweeper.training.compiling import Compiling
from sweeper.training.device import forget_peak_memory, repeatable
from sweeper.training.lanes import Lane, first_done
from sweeper.training.loop import NetworkTraining
from sweeper.training.network import NetworkTrial
from sweeper.training.turns import Steps

Measured = list[tuple[NetworkTrial, Measurement]]


class LaneBrokenError(SweeperError):
    """Training in one lane failed; its ``members`` are where their last epoch ended.

    The cause is what was raised. The other lanes go on.
    """

    def __init__(self, members: Sequence[NetworkTrial]) -> None:
        super().__init__(f"training of {len(members)} trials failed")
        self.members = list(members)


@dataclass(kw_only=True, eq=False)
class _Place:
    """A lane with who trains in it: one trial by itself, or those of a cohort."""

    lane: Lane[Measured]
    structure: str
    trains: NetworkTraining | Cohort

    @property
    def members(self) -> list[NetworkTrial]:
        if isinstance(self.trains, Cohort):
            return list(self.trains.members)
        return [] if self.trains.closed else [self.trains]

    def steps(self) -> Steps[Measured]:
        """One epoch of all of them."""
        if isinstance(self.trains, Cohort):
            together = yield from self.trains.steps()
            return [*together]
        measurement = yield from self.trains.steps()
        return [(self.trains, measurement)]


class Crew:
    """Trials that one thread trains side by side on ``device``.

    ``compiling`` is what ``train.compile: auto`` goes by in a cohort; in lanes nothing is compiled.
    """

    def __init__(self, device: torch.device, *, compiling: Compiling | None = None) -> None:
        forget_peak_memory(device)
        self.device = device
        self._compiling = compiling
        self._places: list[_Place] = []
        self._turns: deque[Lane[Measured]] = deque()
        self._spare: list[Lane[Measured]] = []
        self._members: list[NetworkTrial] = []

    @property
    def members(self) -> list[NetworkTrial]:
        """Those that train, the longest first."""
        there = [member for place in self._places for member in place.members]
        return [member for member in self._members if member in there]

    @property
    def running(self) -> bool:
        """Whether anybody is in the middle of an epoch."""
        return any(place.lane.running for place in self._places)

    def join(
        self,
        config: TrialConfig,
        *,
        dataset: Dataset,
        objective: tuple[str, bool] = ("val_accuracy", True),
        way: Way = "cohort",
    ) -> NetworkTrial:
        """A new member, which trains from its next epoch on: ``way`` cohort, where its model and
        optimizer can, and else on a stream of its own.

        Raises UsageError for a configuration that cannot train beside others. Whatever is raised,
        memory that does not suffice included, the others are not touched by it.
        """
        if reason := why_not_beside(config, self.device):
            raise UsageError(f"this trial has to train alone: {reason}")
        fused = way == "cohort" and why_alone(config, self.device) is None
        kind = structure(config)
        place = self._place_of(kind, dataset) if fused else None
        lane = place.lane if place else self._spare.pop() if self._spare else Lane(self.device)
        member: NetworkTrial
        try:
            with lane.entered():
                if place is None:
                    place = _Place(
                        lane=lane,
                        structure=kind,
                        trains=Cohort(
                            config, dataset=dataset, device=self.device, compiling=self._compiling
                        )
                        if fused
                        else self._training(config, dataset, objective),
                    )
                if isinstance(place.trains, Cohort):
                    member = place.trains.join(config, objective=objective)
                else:
                    member = place.trains
        except BaseException:
            if place is None or place not in self._places:
                self._spare.append(lane)
            raise
        if place not in self._places:
            self._places.append(place)
        self._members.append(member)
        return member

    def epoch(self, *, interrupt: Interrupt | None = None, begin: bool = True) -> Measured:
        """Train until any lane has finished an epoch; what its members measured.

        The caller closes those that are over. With ``begin`` False nobody begins another epoch, and
        the result is empty once nobody is in the middle of one. Raises Interrupted as soon as
        ``interrupt`` says so, with all members where their last epoch ended, and LaneBrokenError
        where training fails in one lane.
        """
        for place in self._places:
            if begin and place.members and not place.lane.running:
                place.lane.begin(place.steps())
                self._turns.append(place.lane)
        if not self._turns:
            return []
        try:
            with repeatable(self.device):
                lane = first_done(self._turns, Poll(interrupt))
        except BaseException:
            self.rewind()
            raise
        place = next(place for place in self._places if place.lane is lane)
        try:
            return lane.result()
        except Exception as error:
            raise LaneBrokenError(place.members) from error

    def rewind(self, members: Sequence[NetworkTrial] | None = None) -> None:
        """Put members (None: all) that are in the middle of an epoch to where it began.

        Those who share a batch with them as well. Their state is to be read only after that.
        """
        for place in self._places:
            if members is None or any(member in place.members for member in members):
                place.lane.stop()
        self._turns = deque(lane for lane in self._turns if lane.running)

    def test(self, members: Sequence[NetworkTrial]) -> None:
        """Read the test set for these members, those of a cohort in one pass."""
        for place in self._places:
            if isinstance(place.trains, Cohort):
                asked = [each for each in place.trains.members if each in members]
                if len(asked) > 1:
                    place.trains.test(asked)

    def beside(self, member: NetworkTrial) -> tuple[list[NetworkTrial], list[NetworkTrial]]:
        """The others: those in one batch with ``member``, and those in other lanes."""
        batch = next(place.members for place in self._places if member in place.members)
        everybody = self.members
        mates = [other for other in everybody if other in batch and other is not member]
        return mates, [other for other in everybody if other not in batch]

    def lanes(self) -> list[tuple[str, int]]:
        """Structure and number of members of every lane, those without members last."""
        found = [(place.structure, len(place.members)) for place in self._places]
        return sorted(found, key=lambda lane: -lane[1])

    def tidy(self) -> None:
        """Free what nobody trains in any more."""
        for place in [place for place in self._places if not place.members]:
            place.lane.stop()
            place.trains.close()
            self._places.remove(place)
            self._spare.append(place.lane)
        self._turns = deque(lane for lane in self._turns if lane.running)
        self._members = self.members

    def close(self) -> None:
        """Free all; the members are closed."""
        self.rewind()
        for member in self.members:
            member.close()
        self.tidy()

    def _place_of(self, kind: str, dataset: Dataset) -> _Place | None:
        """The cohort that a trial of this structure joins."""
        for place in self._places:
            if isinstance(place.trains, Cohort) and place.trains.takes(kind, dataset):
                return place
        return None

    def _training(
        self, config: TrialConfig, dataset: Dataset, objective: tuple[str, bool]
    ) -> NetworkTraining:
        found = NetworkTraining(config, dataset=dataset, device=self.device, objective=objective)
        if config.train.compile == "auto":
            found.notes["compile"] = "not used: beside others, in lanes, nothing is compiled"
        return found

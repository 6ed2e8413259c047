"""A cohort: trials of one structure that train together and end, fail and follow independently.

All members are at the same batch of an epoch, each at an epoch of its own. Between two epochs a
member may leave (:meth:`Member.close`) and another one join; the next epoch begins with the slots
that are needed. What a member gets is what it would get alone: its own initial weights, order of
images, augmentation, dropout, learning rate and number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from sweeper.config import TrialConfig
from sweeper.data import Dataset
from sweeper.errors import UsageError
from sweeper.measurement import Measurement
from sweeper.training.base import Interrupt, Poll, TrainingClosedError
from sweeper.training.cohort.engine import CohortEngine, Seat
from sweeper.training.cohort.rules import structure, why_alone
from sweeper.training.compiling import Compiling
from sweeper.training.device import forget_peak_memory, repeatable
from sweeper.training.network import NetworkTrial, Pass
from sweeper.training.rows.numbers import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from sweeper.training.rows.optimizer import kept_state
from sweeper.training.turns import Steps, driven

_IDLE_SHARE: Final = 0.25
"""So many slots of a captured step may stay empty: a smaller step has to be captured anew. One that
is compiled keeps them all, as long as there is a member: compiling takes longer than they do."""


class Cohort:
    """Trials of one structure on one device, trained as one batch.

    ``config`` is any of theirs; ``compiling`` is what ``train.compile: auto`` goes by. Raises
    UsageError where it cannot join a cohort at all.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        dataset: Dataset,
        device: torch.device,
        compiling: Compiling | None = None,
    ) -> None:
        reason = why_alone(config, device)
        if reason is not None:
            raise UsageError(f"this trial has to train alone: {reason}")
        forget_peak_memory(device)
        self.structure = structure(config)
        self._dataset = dataset
        self._device = device
        self._engine: CohortEngine | None = CohortEngine(
            config, dataset=dataset, device=device, compiling=compiling
        )
        self._validation = self._engine.part(dataset.val)
        self._slots: list[Member | None] = []
        self._joining: list[Member] = []

    @property
    def members(self) -> list[Member]:
        """Those that train, the longest first."""
        return [member for member in self._slots if member is not None] + self._joining

    @property
    def graph(self) -> str:
        """Whether the common step is a CUDA graph, and if not, why."""
        return self._open().graph

    def takes(self, kind: str, dataset: Dataset) -> bool:
        """Whether a trial of this structure and data set may join."""
        return self._engine is not None and kind == self.structure and dataset is self._dataset

    def join(
        self, config: TrialConfig, *, objective: tuple[str, bool] = ("val_accuracy", True)
    ) -> Member:
        """A new member, which trains from the next epoch on.

        Raises UsageError where its structure is another one.
        """
        if structure(config) != self.structure:
            raise UsageError("all members of a cohort must have the same structure")
        member = Member(
            self,
            self._open(),
            config,
            dataset=self._dataset,
            device=self._device,
            objective=objective,
        )
        self._joining.append(member)
        return member

    def epoch(self, *, interrupt: Interrupt | None = None) -> list[tuple[Member, Measurement]]:
        """Train every member for one epoch; what each of them measured.

        The caller closes those that are over. Raises Interrupted as soon as ``interrupt`` says so.
        Whatever is raised, memory that does not suffice included, all members are afterwards where
        they were before.
        """
        with repeatable(self._device):
            return driven(self.steps(), Poll(interrupt))

    def steps(self) -> Steps[list[tuple[Member, Measurement]]]:
        """As :meth:`epoch`, with pauses; to close it before its end puts all members back."""
        engine = self._open()
        self._settle(engine)
        if not self._slots:
            return []
        try:
            plans = [slot.upcoming if slot is not None else (1, 0.0) for slot in self._slots]
            trained = yield from engine.training(
                epochs=[epoch for epoch, _ in plans], lrs=[lr for _, lr in plans]
            )
            validated = yield from engine.evaluation(self._validation)
            for member in self._slots:  # what can fail, before any of them counts its epoch
                if member is not None:
                    member._reserved()
            measured = [
                (member, member._concluded(one, other))
                for member, one, other in zip(self._slots, trained, validated, strict=True)
                if member is not None
            ]
        except BaseException as error:
            engine.roll_back()
            if isinstance(error, Exception):  # where memory does not suffice, slots must get fewer
                engine.drop_compiled()
            raise
        return measured

    def test(self, members: Sequence[Member]) -> None:
        """Read the test set for these members, in one pass; their ``test()`` then knows it.

        Those without a finite epoch are left out.
        """
        engine = self._open()
        asked = [member for member in members if member.testable]
        states = [pair for member in asked for pair in member.states_to_test()]
        inputs, passes = engine.part(self._dataset.test), list[Pass]()
        at_once = max(2, len(self._slots))
        for start in range(0, len(states), at_once):
            passes += engine.evaluate_states(states[start : start + at_once], inputs)
        for index, member in enumerate(asked):
            member.remember_test(last=passes[2 * index], at_best=passes[2 * index + 1])

    def close(self) -> None:
        """Free all; the members are closed."""
        for member in self.members:
            member.close()
        if self._engine is not None:
            self._engine.drop_graph()
        self._engine = None

    def leave(self, member: Member) -> None:
        """Called by a member that is closed."""
        self._slots = [None if slot is member else slot for slot in self._slots]
        self._joining = [other for other in self._joining if other is not member]

    def _settle(self, engine: CohortEngine) -> None:
        """Give everybody a slot: a free one first; then drop the free ones that are too many."""
        slots, joining = list(self._slots), list(self._joining)
        free = [k for k, slot in enumerate(slots) if slot is None]
        while free and joining:
            slots[free.pop(0)] = joining.pop(0)
        seats: list[Seat | None] = [
            slot.seat if slot is not None else old
            for slot, old in zip(slots, engine.seats, strict=True)
        ]
        tolerated = len(slots) * _IDLE_SHARE if engine.graph == "captured" else 0.0
        if engine.is_compiled:
            tolerated = len(slots)
        if joining or len(free) > tolerated or len(free) == len(slots):
            slots = [*(slot for slot in slots if slot is not None), *joining]
            seats = [slot.seat for slot in slots if slot is not None]
            joining = []
        engine.arrange([seat for seat in seats if seat is not None])
        self._slots, self._joining = slots, joining

    def _open(self) -> CohortEngine:
        if self._engine is None:
            raise TrainingClosedError
        return self._engine


class Member(NetworkTrial):
    """One trial of a cohort: its results, and its state in the format of a trial alone.

    A state goes either way: a trial that was checkpointed in a cohort goes on alone, and one that
    trained alone goes on in a cohort.
    """

    def __init__(
        self,
        cohort: Cohort,
        engine: CohortEngine,
        config: TrialConfig,
        *,
        dataset: Dataset,
        device: torch.device,
        objective: tuple[str, bool],
    ) -> None:
        super().__init__(config, dataset=dataset, device=device, objective=objective)
        self._cohort = cohort
        self._engine = engine
        self._seat: Seat | None = engine.seat(config)
        self.parameters = engine.layout.trained
        self.notes["precision"] = engine.precision.name
        self.notes["graph"] = "that of its cohort"
        self.notes["compile"] = (
            engine.compiled if config.train.compile == "off" else "that of its cohort"
        )
        self.notes["standardize"] = "once" if engine.inputs.kept_standardized else "every batch"

    @property
    def seat(self) -> Seat:
        """Raises TrainingClosedError once the member is closed."""
        if self._seat is None:
            raise TrainingClosedError
        return self._seat

    @property
    def upcoming(self) -> tuple[int, float]:
        """Number and learning rate of the coming epoch."""
        return self._epoch + 1, self._schedule.lr

    @property
    def testable(self) -> bool:
        """See :meth:`NetworkTrial.testable`."""
        return self._seat is not None and super().testable

    def states_to_test(self) -> list[tuple[TrialConfig, Mapping[str, Tensor]]]:
        """The model after the last epoch, and after the best one."""
        return [(self.config, self._weights()), (self.config, self._decided().weights)]

    def remember_test(self, *, last: Pass, at_best: Pass) -> None:
        """Keep what the test set gave for :meth:`states_to_test`."""
        self._test = self._final(last=last, at_best=at_best)

    def close(self) -> None:
        """Leave the cohort. See :meth:`Trial.close`."""
        if self._seat is not None:
            self._cohort.leave(self)
        self._seat = None
        self._forget_best()

    def _engine_state(self) -> dict[str, Any]:
        numbers, layout = self.seat.numbers, self._engine.layout
        return {
            "model": {name: value.to("cpu", copy=True) for name, value in self._weights().items()},
            "optimizer": optimizer_state(numbers, layout, kept_state(self.config.optimizer)),
            "scaler": {},
        }

    def _restore_engine(self, state: Mapping[str, Any]) -> None:
        numbers, layout = self.seat.numbers, self._engine.layout
        load_model_state(numbers, layout, state["model"])
        load_optimizer_state(numbers, layout, state["optimizer"])

    def _weights(self) -> Mapping[str, Tensor]:
        return model_state(self.seat.numbers, self._engine.layout, self._engine.names)

    def _tested(self) -> dict[str, float]:
        inputs = self._engine.part(self.dataset.test)
        last, at_best = self._engine.evaluate_states(self.states_to_test(), inputs)
        return self._final(last=last, at_best=at_best)

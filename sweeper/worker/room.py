"""How much room there is in a worker beside the trials that it trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from sweeper.space import structural
from sweeper.store import StoredStudy
from sweeper.worker.cohorts import Cohorts

if TYPE_CHECKING:  # torch takes seconds to load: only a worker that has a trial needs it
    from sweeper.config import TrialConfig
    from sweeper.training.cohort import Choice
    from sweeper.training.crew import Crew
    from sweeper.worker.attempt import Attempt

_MOST: Final = 256
"""As ``resources.cohort``."""
_FULL: Final = 1 + 1e-9


@dataclass(kw_only=True)
class Room:
    """What a company of one study takes of its device and its memory.

    A lane takes as much of the device as its number of trials is of the best number, and no less
    than one trial in a lane of its own. ``most``: so many fitted into memory.
    """

    cohorts: Cohorts
    study: StoredStudy
    crew: Crew
    most: int = _MOST
    _choices: dict[str, Choice] = field(default_factory=dict)
    _structures: dict[str, str] = field(default_factory=dict)

    def taken(self) -> list[tuple[str, int]]:
        """Structure and number of trials of every lane that has any."""
        return [(kind, count) for kind, count in self.crew.lanes() if count]

    def kinds(self) -> set[str]:
        """The structures in training."""
        return {kind for kind, _ in self.taken()}

    def choice(self, config: TrialConfig) -> Choice:
        """How many of its structure train at once, and how; remembered while this company lasts."""
        from sweeper.training.cohort import Choice, structure, why_alone

        kind = structure(config)
        if kind not in self._choices:
            choice = self.cohorts.choice(self.study, config, measure=False)
            if choice.way == "cohort" and why_alone(config, self.crew.device):
                choice = Choice(way="streams", size=choice.beside, beside=choice.beside)
            self._choices[kind] = choice
        return self._choices[kind]

    def admits(self, attempt: Attempt) -> bool:
        """Whether the trial may join those that train."""
        from sweeper.training.cohort import structure

        config = attempt.configured()
        if self.cohorts.why_by_itself(attempt, config) is not None:
            return False
        self.choice(config)
        return self.has_for(structure(config))

    def welcome(self) -> set[str]:
        """The structures known so far of which one more fits."""
        return {kind for kind in self._choices if self.has_for(kind)}

    def has_for(self, kind: str | None) -> bool:
        """Whether one more of a structure (None: of any other) fits."""
        if kind and self.cohorts.limit({kind}) == 1:  # whatever it is, it is to be by itself
            return False
        lanes = self.taken()
        if not lanes:
            return True
        limit = self.cohorts.limit({*self.kinds(), *([kind] if kind else [])})
        if sum(count for _, count in lanes) >= min(self.most, limit or self.most):
            return False
        choice = self._choices[kind] if kind else list(self._choices.values())[-1]
        if kind and choice.way == "cohort":
            for index, (each, count) in enumerate(lanes):
                if each == kind:
                    lanes[index] = (each, count + 1)
                    return self._share(lanes) <= _FULL
        return self._share(lanes) + 1 / choice.beside <= _FULL

    def limit_to(self, most: int, kinds: set[str]) -> None:
        """Memory has room for no more: here, and wherever all these structures are together."""
        self.most = min(self.most, most)
        self.cohorts.remember_limit(kinds, most)

    def structure_of(self, values: Mapping[str, Any]) -> str | None:
        """The structure of a trial of these values, worked out once for each; None: they do not
        fit together."""
        from sweeper.training.cohort import structure

        deciding = {path: value for path, value in values.items() if structural(path)}
        key = json.dumps(deciding, sort_keys=True, default=repr)
        if key not in self._structures:
            try:
                self._structures[key] = structure(self.study.spec.trial_config(values))
            except ValidationError:
                return None
        return self._structures[key]

    def _share(self, lanes: list[tuple[str, int]]) -> float:
        """How much of the device these lanes take."""
        share = 0.0
        for kind, count in lanes:
            choice = self._choices[kind]
            share += max(count / choice.size, 1 / choice.beside)
        return share

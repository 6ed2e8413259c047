"""What a worker knows of how often a trial's shapes repeat (``train.compile: auto``)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from sweeper.settings import Settings
from sweeper.space import FUSIBLE
from sweeper.study.plan import plan
from sweeper.study.spec import StudySpec

if TYPE_CHECKING:  # torch takes seconds to load
    from sweeper.training import Compiling

_BUILT_IN: Final = frozenset({"model.dropout", "train.label_smoothing"})
_SAME_PROGRAM: Final = (FUSIBLE - _BUILT_IN) | {"data.standardize"}
"""Paths that leave the compiled code as it is: not the rates that become part of it."""


def going_by(settings: Settings, spec: StudySpec) -> Compiling:
    """What ``train.compile: auto`` goes by in the trials of ``spec``."""
    from sweeper.training import Compiling

    return Compiling(
        measured=settings.compile_gains,
        code=settings.compiled_code,
        repeats=repeats(spec),
        together=repeats(spec, same=FUSIBLE),
    )


def repeats(spec: StudySpec, *, same: Collection[str] = _SAME_PROGRAM) -> int:
    """How many trials of the study run the same program as any one of them, in the mean.

    The budget, spread over every combination of what changes the program, which the paths ``same``
    do not; 1 where such a parameter is continuous. All workers together: they share what one of
    them has compiled.
    """
    planned = plan(spec)
    counts = [each.count for each in planned.parameters if each.path not in same]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return 1
    return max(1, planned.trials // math.prod(known))

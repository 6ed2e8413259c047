"""What differs between two specs of one study, and whether it is still the same study.

Compared is what a spec means, with defaults filled in: a file that spells a default out is no
other study than one that leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from sweeper.space import Range, same
from sweeper.study.spec import Grid, ReferenceOnly, StudySpec

Effect = Literal["none", "extend", "another"]

_HARMLESS: Final = frozenset(
    {
        "description", "resources", "faults", "search.stop",
        "train.graph", "train.compile", "train.layer_statistics",
    }
)  # fmt: skip
"""What decides no trial's result: words, who trains, how fast, until when, what is recorded."""
TRIALS: Final = "search.trials"
"""The path of the budget, the one value that may grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One difference: the dotted path, and the values before and after; None for absent.

    ``effect``: ``none`` on results, ``extend`` for a larger budget, or ``another`` study.
    """

    path: str
    old: Any
    new: Any
    effect: Effect

    @property
    def harmless(self) -> bool:
        """Whether the study stays what it is."""
        return self.effect == "none"

    @property
    def extends(self) -> bool:
        """Whether the study grows and its finished trials stay what they are."""
        return self.effect == "extend"

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.old)} → {_shown(self.new)}"


def changes(old: StudySpec, new: StudySpec) -> list[Change]:
    """Every difference between two specs, in the order of the sections."""
    before, after = _meaning(old), _meaning(new)
    found = []
    for path in dict.fromkeys([*before, *after]):
        if not same(before.get(path), after.get(path)):
            effect = _effect(path, before.get(path), after.get(path), old, new)
            found.append(
                Change(path=path, old=before.get(path), new=after.get(path), effect=effect)
            )
    return found


def _meaning(spec: StudySpec) -> dict[str, Any]:
    """The spec as dotted paths to plain values. Parameters and lists are one value each."""
    full = spec.model_dump(mode="json", exclude={"parameters", "reference"})
    written = spec.sections()
    # Where a parameter exchanges the variant, it takes over what is written and no default.
    for section in ("data", "model"):
        if f"{section}.name" in spec.parameters:
            full[section] = written[section]
    if spec.parameters.keys() & {"optimizer.schedule", "optimizer.schedule.name"}:
        full["optimizer"]["schedule"] = written["optimizer"].get("schedule", {})
    if isinstance(spec.search.sampler, Grid | ReferenceOnly):
        full["search"]["trials"] = None  # the space, or the list, tells how many
    meaning = dict(_flat("", full))
    for path, parameter in spec.parameters.items():
        meaning[f"parameters.{path}"] = parameter.model_dump(mode="json", exclude_defaults=True)
        if isinstance(parameter, Range):  # 1 is 1.0, but one range has no 1.5
            meaning[f"parameters.{path}.numbers"] = "whole" if parameter.integer else "real"
    if spec.reference:
        meaning["reference.source"] = spec.reference.source
        for index, trial in enumerate(spec.reference.trials):
            meaning.update(_flat(f"reference.trials[{index}]", trial.model_dump(mode="json")))
    return meaning


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    is_point = path.startswith("reference.") and path.endswith(("params", "reported"))
    if isinstance(value, Mapping) and not is_point:
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}" if path else key, inner)
    else:
        yield path, value


def _effect(path: str, old: Any, new: Any, before: StudySpec, after: StudySpec) -> Effect:
    if _is_harmless(path, before) and _is_harmless(path, after):
        return "none"
    more = isinstance(old, int) and isinstance(new, int) and new > old
    return "extend" if path == TRIALS and more else "another"


def _is_harmless(path: str, spec: StudySpec) -> bool:
    if path.startswith("reference."):
        runs = isinstance(spec.search.sampler, ReferenceOnly)
        return not (runs and path.endswith(".params"))
    return any(path == each or path.startswith(f"{each}.") for each in _HARMLESS)


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)

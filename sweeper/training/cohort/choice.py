"""Which way to train several trials at once is the fastest: from what was measured, and remembered.

Remembered by structure, device, and the versions of torch and of the step. With ``train.compile:
auto`` a study that is long enough goes by compiled cohorts as well, which are measured for the
first such study.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

import torch

from sweeper.config import TrialConfig
from sweeper.training import remembered
from sweeper.training.cohort.rules import Way, structure
from sweeper.training.compiling import TRY_S, Compiling

_WORTH: Final = 1.05
"""More trials at once have to train so many times as fast as fewer; else fewer are better."""
_COMPILATIONS: Final = 4
"""Compiled cohorts are measured from so many times as much training on as one step is compiled
for: one is compiled for every number that is tried."""

Rates = Mapping[int, float]
"""Images a second, all trials together, by the number of trials at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How trials of a structure train fastest on a device.

    ``size`` of them at once in this ``way``. ``beside``: how many at once are the fastest in lanes
    of their own, which is what counts beside trials of other structures; 1 where nothing is won.
    """

    way: Way
    size: int
    beside: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured for a structure on a device.

    ``rates``: by way; one at a time is one trial alone. ``compiled``: of compiled cohorts, None
    where they were not tried. ``images`` of an epoch. ``up_to`` and ``compiled_up_to``: the largest
    number that was to be tried of either, as the study had no more trials; None where nothing but
    the device set a limit.
    """

    rates: Mapping[Way, Rates]
    images: int
    compiled: Rates | None = None
    up_to: int | None = None
    compiled_up_to: int | None = None

    def suffices(self, most: float) -> bool:
        """Whether ``rates`` say what is the fastest for a study of so many trials."""
        return _suffice(self.rates.values(), self.up_to, most)

    def compiled_suffices(self, most: float) -> bool:
        """The same of ``compiled``."""
        return self.compiled is not None and _suffice([self.compiled], self.compiled_up_to, most)

    def choice(self) -> Choice:
        """The fastest without compiling; a cohort where ways are equal."""
        return chosen_way(self.rates)

    def choice_compiled(self) -> Choice:
        """The fastest if a cohort, or a trial alone, may be compiled."""
        plain, compiled = self.choice(), self.compiled or {}
        size = chosen(compiled)
        fastest = max((rate for found in self.rates.values() for rate in found.values()), default=0)
        if compiled.get(size, 0.0) <= fastest * _WORTH:
            return plain
        if size == 1:
            return Choice(way="alone", size=1, beside=1)
        return replace(plain, way="cohort", size=size)

    def is_long(self, config: TrialConfig, how: Compiling, device: torch.device) -> bool:
        """Whether a study has enough training for compiling several times."""
        alone = max((found.get(1, 0.0) for found in self.rates.values()), default=0.0)
        if not alone:
            return False
        seconds = self.images * config.train.epochs * how.together / alone
        return seconds >= _COMPILATIONS * TRY_S[device.type]


def _suffice(found: Iterable[Rates], up_to: int | None, most: float) -> bool:
    """Whether no larger number would be tried, or would have been: more brought nothing, or did not
    fit."""
    tried = max((size for rates in found for size in rates), default=0)
    return up_to is None or most <= up_to or tried < up_to


def chosen_way(rates: Mapping[Way, Rates]) -> Choice:
    """The way whose best number is the fastest; a cohort where both are equal."""
    sizes = {way: chosen(found) for way, found in rates.items()}
    beside = sizes.get("streams", 1)
    best = max(sizes, key=lambda way: (rates[way].get(sizes[way], 0.0), way == "cohort"))
    if sizes[best] == 1:
        return Choice(way="alone", size=1, beside=1)
    return Choice(way=best, size=sizes[best], beside=beside)


def chosen(rates: Rates) -> int:
    """The smallest number that no larger one beats by what makes it worth it."""
    best = 1
    for size in sorted(rates):
        if rates[size] > rates.get(best, 0.0) * _WORTH:
            best = size
    return best


def known_way(
    config: TrialConfig,
    *,
    device: torch.device,
    file: Path,
    compiling: Compiling | None = None,
    most: float = math.inf,
) -> Choice | None:
    """What the ``file`` remembers for the structure, or None where that does not suffice for a
    study of ``most`` trials."""
    measured = recalled(config, device=device, file=file)
    if measured is None or not measured.suffices(most):
        return None
    if config.train.compile != "auto" or compiling is None:
        return measured.choice()
    if not measured.is_long(config, compiling, device):
        return measured.choice()
    return measured.choice_compiled() if measured.compiled_suffices(most) else None


def recalled(config: TrialConfig, *, device: torch.device, file: Path) -> Measured | None:
    """What was measured for the structure before; None where that is nothing that makes sense."""
    try:
        found = remembered.read(file)[_key(config, device)]
        rates = {way: _rates(found["samples_per_s"][way]) for way in found["samples_per_s"]}
        compiled = found["compiled"]
        measured = Measured(
            rates=rates,
            images=int(found["images"]),
            compiled=None if compiled is None else _rates(compiled),
            up_to=_limit(found["up_to"]),
            compiled_up_to=_limit(found["compiled_up_to"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return measured if rates and rates.keys() <= set(get_args(Way)) else None


def remember(config: TrialConfig, measured: Measured, *, device: torch.device, file: Path) -> None:
    """Keep it in ``file``; one that cannot be written costs the next a measurement.

    With what follows from it, for people.
    """
    entry = {
        **asdict(measured.choice()),
        "samples_per_s": measured.rates,
        "compiled": measured.compiled,
        "images": measured.images,
        "up_to": measured.up_to,
        "compiled_up_to": measured.compiled_up_to,
    }
    remembered.keep(file, _key(config, device), entry)


def device_name(device: torch.device) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _key(config: TrialConfig, device: torch.device) -> str:
    return f"{structure(config)} {device_name(device)} torch {torch.__version__} {remembered.STEP}"


def _limit(found: Any) -> int | None:
    return None if found is None else int(found)


def _rates(found: Mapping[str, Any]) -> dict[int, float]:
    return {int(size): float(rate) for size, rate in found.items()}

"""Optuna's samplers where many workers share a store that others can write to.

Optuna keeps the optimizer of CMA-ES with the trials, and unpickles whatever it finds there: who can
write to the store could have every worker run a program. And it counts the points of a quasi-Monte
Carlo sequence in the study by reading and writing: two that draw at once get one point twice.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

_NUMPY: Final = ("numpy._core", "numpy.core")
"""Since NumPy 2, and before."""
_HARMLESS: Final = {
    ("cmaes._cma", "CMA"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"{core}.multiarray", name) for core in _NUMPY for name in ("_reconstruct", "scalar")),
    *((f"{core}.numeric", "_frombuffer") for core in _NUMPY),
}
"""What the state of an optimizer without margin consists of."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(
                "the state of CMA-ES in the store must consist of an optimizer and its arrays, but "
                f"it names {module}.{name}; somebody has changed it"
            )
        return super().find_class(module, name)


class QmcSampler(optuna.samplers.QMCSampler):
    """Optuna's, with the trial's place in the sequence and the space given.

    Optuna reads the space off an earlier trial, and draws the first ones at random.
    """

    def __init__(self, place: int, space: Mapping[str, BaseDistribution], **options: Any) -> None:
        super().__init__(**options)
        self._place = place
        self._space = {name: options for name, options in space.items() if not options.single()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space

    def _find_sample_id(
        self, study: optuna.Study, search_space: Mapping[str, BaseDistribution]
    ) -> int:
        return self._place


class CmaEsSampler(optuna.samplers.CmaEsSampler):
    """Optuna's, but for the unpickling. Raises pickle.UnpicklingError."""

    def _restore_optimizer(self, completed_trials: Iterable[FrozenTrial]) -> Any:
        for trial in reversed(list(completed_trials)):
            parts = {
                key: value
                for key, value in trial.system_attrs.items()
                if key.startswith(self._attr_key_optimizer)
            }
            if parts:
                state = bytes.fromhex(self._concat_optimizer_attrs(parts))
                return _Unpickler(io.BytesIO(state)).load()
        return None

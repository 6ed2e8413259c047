"""CMA-ES, whose state lies pickled in the store, read without running what else may lie there.

Optuna keeps the optimizer with the trials, and its sampler unpickles whatever it finds: who can
write to the store could have every worker run a program.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from typing import Any, Final

import optuna
from optuna.trial import FrozenTrial

_NUMPY: Final = ("numpy._core.multiarray", "numpy.core.multiarray")
_HARMLESS: Final = {
    ("cmaes._cma", "CMA"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((module, name) for module in _NUMPY for name in ("_reconstruct", "scalar")),
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

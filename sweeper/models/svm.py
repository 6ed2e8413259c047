"""Support vector machine with radial kernel (report R1a): the baseline that needs no epochs.

Not a torch module: it is fitted once, on the CPU, over numpy arrays of flattened images.

Shapes: n examples, F features, K classes.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC

from sweeper.config.model import Svm as SvmConfig
from sweeper.errors import UsageError

Array = NDArray[Any]


class SvmModel:
    """scikit-learn's ``SVC`` with the settings of the configuration."""

    def __init__(self, config: SvmConfig) -> None:
        self._svc = SVC(C=config.C, gamma=config.gamma, kernel="rbf")

    def fit(self, x_nF: Array, y_n: Array) -> Self:
        """Fit to examples ``x_nF`` with labels ``y_n``; at least two classes must occur.

        Time grows with the square of n and worse. Raises UsageError for a single class.
        """
        if len(np.unique(y_n)) < 2:
            raise UsageError(
                "a support vector machine needs examples of at least two classes, "
                f"but all {len(y_n)} examples are of one; raise data.limit"
            )
        self._svc.fit(x_nF, y_n)
        return self

    def predict(self, x_nF: Array) -> Array:
        """The class of each example, [n]."""
        return np.asarray(self._svc.predict(x_nF))

    def accuracy(self, x_nF: Array, y_n: Array) -> float:
        """Share of examples classified right, 0 to 1."""
        return float(np.mean(self.predict(x_nF) == y_n))

    def hinge(self, x_nF: Array, y_n: Array) -> float:
        """Mean hinge loss: how far each example falls short of a margin of 1.

        The margin is the decision value of the true class minus the highest of the others
        (Crammer and Singer); with two classes the signed decision value. An example of a class
        that training never saw has the lowest of its decision values as its own.
        """
        decision = np.asarray(self._svc.decision_function(x_nF), dtype=np.float64)
        classes = self._svc.classes_
        if decision.ndim == 1:
            decision = np.stack((-decision / 2, decision / 2), axis=1)
        is_true_nK = np.asarray(y_n)[:, None] == classes[None, :]
        seen_n = is_true_nK.any(axis=1)
        true_n = np.where(
            seen_n, np.where(is_true_nK, decision, 0.0).sum(axis=1), decision.min(axis=1)
        )
        other_n = np.where(is_true_nK, -np.inf, decision).max(axis=1)
        return float(np.maximum(0.0, 1.0 - (true_n - other_n)).mean())

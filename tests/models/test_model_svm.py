"""The support vector machine of R1a."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_circles
from sklearn.metrics import hinge_loss

from sweeper.config.model import Svm
from sweeper.errors import UsageError
from sweeper.models.svm import SvmModel


def test_it_separates_circles() -> None:
    x_nF, y_n = make_circles(400, noise=0.05, factor=0.5, random_state=0)
    model = SvmModel(Svm(name="svm")).fit(x_nF[:300], y_n[:300])
    assert model.predict(x_nF[300:]).shape == (100,)
    assert model.accuracy(x_nF[300:], y_n[300:]) == 1.0
    expected = hinge_loss(y_n[300:], model._svc.decision_function(x_nF[300:]))
    assert model.hinge(x_nF[300:], y_n[300:]) == pytest.approx(expected)
    assert model.hinge(x_nF[300:], 1 - y_n[300:]) > 1.0


def test_several_classes_have_the_hinge_loss_of_crammer_and_singer() -> None:
    x_nF, y_n = load_digits(return_X_y=True)
    model = SvmModel(Svm(name="svm", C=10.0, gamma=0.001)).fit(x_nF[:500], y_n[:500])
    assert model.accuracy(x_nF[500:], y_n[500:]) > 0.9
    expected = hinge_loss(y_n[500:], model._svc.decision_function(x_nF[500:]))
    assert model.hinge(x_nF[500:], y_n[500:]) == pytest.approx(expected)


def test_a_class_that_training_never_saw_costs_more_than_a_margin() -> None:
    x_nF, y_n = load_digits(return_X_y=True)
    model = SvmModel(Svm(name="svm")).fit(x_nF[y_n < 4], y_n[y_n < 4])
    assert model.hinge(x_nF[y_n == 9], y_n[y_n == 9]) > 1.0
    assert model.accuracy(x_nF[y_n == 9], y_n[y_n == 9]) == 0.0


def test_a_single_class_is_refused() -> None:
    with pytest.raises(UsageError, match="at least two classes"):
        SvmModel(Svm(name="svm")).fit(np.zeros((5, 2)), np.zeros(5, dtype=int))

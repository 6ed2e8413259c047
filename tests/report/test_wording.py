"""How numbers, times and names read."""

from __future__ import annotations

import math

import pytest

from sweeper.report import wording


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("test_accuracy", 0.75907, "0.7591"),
        ("test_loss", 0.0, "0.0000"),
        ("test_loss", 0.00012, "0.00012"),
        ("test_loss", 2.5e-7, "2.5e-7"),
        ("test_loss", -1.5, "−1.5000"),
        ("test_loss", math.inf, "∞"),
        ("test_loss", math.nan, "–"),
        ("test_loss", None, "–"),
        ("mean_seconds", 28.468, "28.47"),
        ("mean_seconds", 0.01234, "0.0123"),
        ("model_parameters", 2188298.0, "2,188,298"),
        ("best_epoch", 12.0, "12"),
    ],
)
def test_a_metric_has_the_digits_that_count(name: str, value: float | None, text: str) -> None:
    assert wording.metric(name, value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "+0.0123"),
        (-0.000836, "−0.0008"),
        (0.00001, "±0.0000"),
        (0.0, "±0.0000"),
        (None, "–"),
    ],
)
def test_a_difference_has_its_sign(value: float | None, text: str) -> None:
    assert wording.signed("test_accuracy", value) == text


def test_an_infinite_difference_has_its_sign() -> None:
    assert wording.signed("test_loss", math.inf) == "+∞"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (48.2, "48 s"),
        (200.0, "3 min 20 s"),
        (7500.0, "2 h 05 min"),
        (None, "–"),
        (math.inf, "–"),
    ],
)
def test_a_duration_reads_as_people_say_it(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (0.000025, "2.5e-5"),
        (0.00075, "0.00075"),
        (0.0, "0"),
        (128, "128"),
        (True, "true"),
        ([], "none"),
        (["crop", "flip"], "crop + flip"),
        ([{"name": "crop", "size": 28, "padding": 0}, "flip"], "crop (size 28, padding 0) + flip"),
        ({"name": "plateau"}, "plateau"),
        ("<b>", "<b>"),
        (None, "–"),
    ],
)
def test_a_setting_reads_in_a_few_words(setting: object, text: str) -> None:
    assert wording.value(setting) == text


def test_names_are_as_short_as_they_can_be() -> None:
    paths = ["optimizer.name", "optimizer.lr", "train.batch_size", "model.name", "data.name"]
    assert list(wording.short_names(paths).values()) == [
        "optimizer",
        "lr",
        "batch size",
        "model",
        "data",
    ]
    assert wording.short_names(["a.lr", "b.lr"]) == {"a.lr": "a.lr", "b.lr": "b.lr"}


def test_a_traceback_comes_down_to_its_last_line() -> None:
    assert wording.last_line("Traceback\n  File\nValueError: no\n\n") == "ValueError: no"
    assert wording.last_line("  \n") == "no message"

"""Published rows are matched to trials by configuration, whatever their seed."""

from __future__ import annotations

from typing import Any

import pytest
from report.conftest import made, row

from sweeper.report.configurations import Spread
from sweeper.report.reference import length, published, reference_table, spread_cell, verdict


def reference(*trials: dict[str, Any]) -> dict[str, Any]:
    return {"source": "R1", "trials": list(trials)}


def told(*rows: Any, **sections: Any) -> list[list[str]]:
    """The texts of the reference table."""
    data = made(*rows, **sections)
    table = reference_table(data, published(data))
    return [[cell.text for cell in line] for line in table.rows]


def test_a_row_is_measured_by_every_seed_of_its_configuration() -> None:
    lines = told(
        row(0, params={"optimizer.lr": 0.01, "train.seed": 0}, accuracy=0.75),
        row(1, params={"optimizer.lr": 0.01, "train.seed": 1}, accuracy=0.79),
        row(2, params={"optimizer.lr": 0.1, "train.seed": 0}, accuracy=0.1),
        parameters={"optimizer.lr": [0.01, 0.1], "train.seed": [0, 1]},
        reference=reference({"params": {"optimizer.lr": 0.01}, "reported": {"test_accuracy": 0.8}}),
    )
    assert lines == [["1", "0.01", "0.8000", "0.7700 ± 0.0283", "−0.0300", "0, 1"]]


def test_a_grid_point_counts_that_sets_what_the_row_leaves_to_the_study() -> None:
    lines = told(
        row(0, params={"optimizer.lr": 0.001, "optimizer.name": "adam"}, accuracy=0.8),
        optimizer={"name": "adam", "lr": 0.001},
        parameters={"optimizer.lr": [0.001, 0.1], "optimizer.name": ["adam", "sgd"]},
        reference=reference(
            {"params": {}, "reported": {"test_accuracy": 0.8}},
            {"params": {"optimizer.name": "sgd"}, "reported": {"test_accuracy": 0.7}},
        ),
    )
    assert lines == [
        ["1", "adam", "0.8000", "0.8000", "±0.0000", "0"],
        ["2", "sgd", "0.7000", "not run", "–", "not run"],
    ]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"state": "running", "outcome": None}, "running"),
        ({"state": "pruned", "outcome": "diverged"}, "diverged"),
        ({"state": "pruned", "outcome": "pruned"}, "pruned"),
        ({"state": "failed", "outcome": "out_of_memory"}, "out of memory"),
    ],
)
def test_a_row_without_a_result_says_what_became_of_it(facts: dict[str, Any], said: str) -> None:
    lines = told(
        row(3, params={"optimizer.lr": 0.5}, **facts),
        reference=reference({"params": {"optimizer.lr": 0.5}, "reported": {"test_accuracy": 0.1}}),
    )
    assert lines == [["1", "0.5", "0.1000", said, "–", f"3 ({said})"]]


def test_a_retried_attempt_does_not_count() -> None:
    lines = told(
        row(0, params={"optimizer.lr": 0.5}, state="retried", outcome="lost"),
        reference=reference({"params": {"optimizer.lr": 0.5}, "reported": {"test_accuracy": 0.1}}),
    )
    assert lines[0][3] == "not run"


def test_columns_are_what_the_rows_differ_in_and_each_metric_three_times() -> None:
    data = made(
        reference=reference(
            {
                "params": {"optimizer.lr": 0.1, "train.epochs": 12},
                "reported": {"max_val_accuracy": 0.9, "test_accuracy": 0.8, "strange": 7.0},
            },
            {"params": {"optimizer.lr": 0.2, "train.epochs": 12}, "reported": {"strange": 8.0}},
        )
    )
    table = reference_table(data, published(data))
    assert [column.title for column in table.columns[:2]] == ["#", "lr"]
    assert table.groups == [
        ("", 2),
        ("test accuracy", 3),
        ("max val accuracy", 3),
        ("strange", 3),
        ("", 1),
    ]


def test_a_row_without_a_figure_shows_what_was_measured_beside_those_that_have_one() -> None:
    first, second = told(
        row(0, params={"optimizer.lr": 0.1}, accuracy=0.5),
        row(1, params={"optimizer.lr": 0.2}, accuracy=0.625),
        parameters={"optimizer.lr": [0.1, 0.2]},
        reference=reference(
            {"params": {"optimizer.lr": 0.1}, "reported": {"test_accuracy": 0.5}},
            {"params": {"optimizer.lr": 0.2}, "note": "the best"},
        ),
    )
    assert first[2:5] == ["0.5000", "0.5000", "±0.0000"]
    assert second[2:5] == ["–", "0.6250", "–"]


def test_rows_published_in_words_have_their_test_accuracy_beside_the_words() -> None:
    sections: dict[str, Any] = {
        "parameters": {"optimizer.lr": [0.1, 0.2]},
        "reference": reference(
            {"params": {"optimizer.lr": 0.1}, "note": "best"},
            {"params": {"optimizer.lr": 0.2}, "note": "slower"},
        ),
    }
    data = made(row(0, params={"optimizer.lr": 0.1}, accuracy=0.625), **sections)
    table = reference_table(data, published(data))
    assert [column.title for column in table.columns] == [
        "#", "lr", "test accuracy, measured", "trials", "note",
    ]  # fmt: skip
    assert [cell.text for cell in table.rows[0]] == ["1", "0.1", "0.6250", "0", "best"]
    assert [cell.text for cell in table.rows[1]] == ["2", "0.2", "–", "not run", "slower"]


@pytest.mark.parametrize(("epochs", "said"), [(12, "12 epochs"), (20, "the epochs of each row")])
def test_the_table_says_after_how_many_epochs_its_rows_were_measured(
    epochs: int, said: str
) -> None:
    data = made(
        row(0, params={"train.epochs": 12}, accuracy=0.7),
        reference=reference(
            {"params": {"train.epochs": 12}, "reported": {"test_accuracy": 0.8}},
            {"params": {"train.epochs": epochs}, "reported": {"test_accuracy": 0.8}},
        ),
    )
    assert reference_table(data, published(data)).note.endswith(f"Measured after {said}.")


def test_a_large_gap_is_marked_and_says_which_way() -> None:
    data = made(
        row(
            0,
            metrics={"test_accuracy": 0.70, "test_loss": 0.5, "max_val_accuracy": 0.81},
            values=(0.7,),
            model_parameters=100,
        ),
        reference=reference(
            {
                "params": {},
                "reported": {
                    "test_accuracy": 0.8,
                    "test_loss": 1.0,
                    "max_val_accuracy": 0.8,
                    "parameters": 50.0,
                },
            }
        ),
    )
    rows = published(data)
    assert reference_table(data, rows).note.startswith("Marked: ")
    compared = rows[0].compared
    assert {name: each.tone for name, each in compared.items()} == {
        "test_accuracy": "bad",
        "test_loss": "good",
        "max_val_accuracy": "",
        "parameters": "",
    }


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("min_train_loss", (3e-5, 9e-5, 2e-5), "4.67e-5 ± 3.79e-5"),
        ("test_loss", (123456.7, 99000.0, 150000.0), "1.24e5 ± 2.55e4"),
        ("test_loss", (1e-7, 1e-7), "1e-7 ± 0"),
        ("test_loss", (0.5, 0.7), "0.6000 ± 0.1414"),
        ("mean_seconds", (0.02, 0.04), "0.03 ± 0.01"),
    ],
)
def test_a_deviation_is_written_as_its_mean_is(
    name: str, values: tuple[float, ...], text: str
) -> None:
    assert spread_cell(name, Spread.of(values)).text == text


def test_the_verdict_is_one_sentence() -> None:
    sections: dict[str, Any] = {
        "parameters": {"optimizer.lr": [0.1, 0.2, 0.3]},
        "reference": reference(
            *(
                {"params": {"optimizer.lr": lr}, "reported": {"test_accuracy": 0.5}}
                for lr in (0.1, 0.2, 0.3)
            )
        ),
    }
    none = made(**sections)
    assert verdict(published(none)) == (
        "None of 3 published rows has been run; launch --reference runs them."
    )
    assert "Measured after" not in reference_table(none, published(none)).note
    begun = made(row(0, params={"optimizer.lr": 0.1}, state="running"), **sections)
    assert verdict(published(begun)) == "None of 3 published rows has been measured yet."
    over = made(
        row(0, params={"optimizer.lr": 0.1}, state="failed", outcome="diverged"), **sections
    )
    assert verdict(published(over)) == "None of 3 published rows has been measured."
    two = made(
        row(0, params={"optimizer.lr": 0.1}, accuracy=0.48),
        row(1, params={"optimizer.lr": 0.2}, accuracy=0.51),
        **sections,
    )
    assert verdict(published(two)) == (
        "2 of 3 published rows measured; test accuracy differs by −2.0 to +1.0 points, "
        "1.5 on average."
    )


def test_marks_are_explained_only_where_there_are_any() -> None:
    data = made(
        row(0, accuracy=0.79),
        reference=reference({"params": {}, "reported": {"test_accuracy": 0.8}}),
    )
    assert "Marked" not in reference_table(data, published(data)).note


def test_the_verdict_on_a_shortened_study_says_so() -> None:
    data = made(
        row(0, accuracy=0.3),
        data={"name": "digits", "limit": 1200},
        train={"epochs": 3},
        reference=reference({"params": {}, "reported": {"test_accuracy": 0.5}}),
    )
    rows = published(data)
    assert verdict(rows, length(data.now.spec, rows)) == (
        "1 of 1 published row measured after 3 epochs of at most 1,200 training images; "
        "test accuracy differs by −20.0 points."
    )

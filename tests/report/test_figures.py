"""Optuna's figures of a study: there where they can be, readable, and without active markup."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from typing import Any

import optuna
import pytest
from report.conftest import HOSTILE, Home, made, row

from sweeper.report.curves import Curve, curves, curves_block
from sweeper.report.drawing import embedded, figure_data
from sweeper.report.factors import factor_figures
from sweeper.report.figures import optuna_figures
from sweeper.report.timeline import timeline
from sweeper.store import held, open_store, queue, standing, studies, tickets
from sweeper.study.spec import StudySpec


def finished(tmp_path: Any, values: list[tuple[float, ...]], **sections: Any) -> Any:
    """A stored study whose trials ended with these objectives, without training."""
    spec = StudySpec.model_validate(
        {"name": "quick", "data": {"name": "digits"}, "model": {"name": "mlp"}, **sections}
    )
    store = open_store(f"sqlite:///{tmp_path / 'store.db'}")
    with store.exclusively():
        study = studies.create(store, spec)
        assert study is not None
        tickets.fill(store, study.id, spec, tickets.tickets(spec, with_reference=False))
    for value in values:
        claimed = queue.claim(store, study.id, "w")
        assert claimed is not None
        held.values_of(spec, study.study, claimed)
        held.finish(store, study.study, claimed, outcome=queue.Outcome.COMPLETED, values=value)
    now = standing(store, study)
    store.close()
    return replace(made(*now.rows, **spec.model_dump(mode="json", exclude_unset=True)), study=study)


def strings(item: Any) -> list[str]:
    """Every string in nested data."""
    if isinstance(item, str):
        return [item]
    if isinstance(item, dict):
        return [text for each in item.values() for text in strings(each)]
    return [text for each in item for text in strings(each)] if isinstance(item, list) else []


TWO = {"optimizer.lr": [0.1, 0.2], "optimizer.weight_decay": [0.0, 0.1]}
ACCURACIES = [(0.1,), (0.5,), (0.4,), (0.2,)]


def test_a_sweep_has_all_of_them(tmp_path: Any) -> None:
    data = finished(tmp_path, ACCURACIES, search={"sampler": "grid"}, parameters=TWO)
    figures = optuna_figures(data)
    assert {figure.name for figure in figures} == {
        "optimization_history",
        "param_importances",
        "parallel_coordinate",
        "slice",
        "contour",
        "rank",
        "edf",
    }


def test_parameters_have_short_names_and_the_objective_its_own(tmp_path: Any) -> None:
    data = finished(tmp_path, ACCURACIES, search={"sampler": "grid"}, parameters=TWO)
    figures = {figure.name: figure for figure in optuna_figures(data)}
    axes = figures["parallel_coordinate"].spec["layout"]["xaxis"]["ticktext"]
    assert axes == ["val accuracy", "lr", "weight decay"]
    for figure in figures.values():
        assert "Objective Value" not in strings(figure.spec)
        assert "template" not in figure.spec["layout"]


def test_a_seed_is_no_parameter_and_one_parameter_explains_everything(home: Home) -> None:
    figures = {figure.name: figure for figure in optuna_figures(home.data("factor"))}
    assert set(figures) == {"optimization_history", "edf", "parallel_coordinate", "slice"}
    axes = figures["parallel_coordinate"].spec["layout"]["xaxis"]["ticktext"]
    assert axes == ["val accuracy", "patch"]


def test_a_parameter_of_one_value_is_no_side_of_a_contour(tmp_path: Any) -> None:
    """Searched are a constant and a range; a second range is worth a figure of those two."""
    lone = {"optimizer.lr": [0.01], "optimizer.weight_decay": {"low": 0.0, "high": 0.1}}

    def drawn(folder: str, parameters: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / folder).mkdir()
        data = finished(
            tmp_path / folder,
            ACCURACIES,
            search={"trials": 4, "sampler": "random"},
            parameters=parameters,
        )
        return {figure.name: figure.spec for figure in optuna_figures(data)}

    assert not drawn("one", lone).keys() & {"contour", "rank", "param_importances"}
    two = drawn("two", {**lone, "train.batch_size": {"low": 10, "high": 99}})
    axes = [two["contour"]["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
    assert sorted(axes) == ["batch size", "weight decay"]
    assert "param_importances" in two


def test_hostile_values_are_text_in_every_figure(tmp_path: Any) -> None:
    link = '<a href="http://evil.example">click</a>'
    data = finished(
        tmp_path,
        ACCURACIES,
        model={"name": "timm", "architecture": "x"},
        search={"sampler": "grid"},
        parameters={"model.architecture": [link, "plain"], "optimizer.lr": [0.1, 0.2]},
    )
    figures = optuna_figures(data)
    assert len(figures) == 7
    assert any("&lt;a href=" in text for figure in figures for text in strings(figure.spec))
    for figure in figures:
        assert not [text for text in strings(figure.spec) if "<a" in text]
        assert "<" not in embedded(figure.spec)


@pytest.mark.parametrize("objective", [["val_accuracy", "seconds"], ["val_accuracy", "val_loss"]])
def test_several_objectives_have_a_pareto_front(tmp_path: Any, objective: list[str]) -> None:
    data = finished(
        tmp_path,
        [(0.5, 1.0), (0.6, 2.0), (0.4, 3.0)],
        objective=objective,
        search={"trials": 3, "sampler": "random"},
        parameters={"optimizer.lr": {"low": 0.1, "high": 0.2}},
    )
    (figure,) = optuna_figures(data)
    assert figure.name == "pareto_front"
    others, front = figure.spec["data"]
    assert (others["name"], others["x"]) == ("others", [0.4])
    assert (front["name"], front["x"], front["customdata"]) == ("on the front", [0.5, 0.6], [0, 1])
    assert front["marker"]["size"] > others["marker"]["size"]
    assert not [trace for trace in (others, front) if "colorbar" in trace["marker"]]


def test_a_front_of_three_objectives_is_drawn_in_space(tmp_path: Any) -> None:
    data = finished(
        tmp_path,
        [(0.5, 1.0, 1.0), (0.6, 2.0, 1.0)],
        objective=["val_accuracy", "seconds", "val_loss"],
        search={"trials": 2, "sampler": "random"},
        parameters={"optimizer.lr": {"low": 0.1, "high": 0.2}},
    )
    (figure,) = optuna_figures(data)
    assert [trace["showlegend"] for trace in figure.spec["data"]] == [False, True]
    assert figure.spec["layout"]["scene"]["zaxis"]["title"]["text"] == "val loss"


def test_only_formatting_tags_of_a_figure_stay() -> None:
    import plotly.graph_objects as go

    drawn = go.Figure(go.Scatter(x=[1], y=[1], name=f"a<br><b>b</b>{HOSTILE}<B>c"))
    name = figure_data(drawn)["data"][0]["name"]
    assert name.startswith("a<br><b>b</b>&lt;script>")
    assert "<img" not in name
    assert "<B>" not in name


def test_embedded_json_cannot_end_its_script_and_has_no_nan() -> None:
    text = embedded({"a": "</script><!--", "b": [float("nan"), float("inf"), 1.5], "c": "\u2028"})
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!--", "b": [None, None, 1.5], "c": "\u2028"}


@pytest.mark.parametrize(("trials", "coloured"), [(10, 10), (11, 8)])
def test_many_trials_are_grey_but_for_the_best(trials: int, coloured: int) -> None:
    rows = [
        row(
            number,
            params={"optimizer.lr": 0.1 + number, "train.batch_size": 10 + number},
            accuracy=number / 100,
            history={1: 0.1, 2: number / 100},
        )
        for number in range(trials)
    ]
    data = made(
        *rows,
        parameters={
            "optimizer.lr": {"low": 0.1, "high": 100.0},
            "train.batch_size": {"low": 1, "high": 100},
        },
    )
    lines = curves(data)
    assert sum(line.highlighted for line in lines) == coloured
    block = curves_block(lines)
    assert block is not None
    labels = [line.label for line in block.legend]
    assert labels[0] == f"lr {0.1 + trials - 1:.4g}, batch size {9 + trials}"
    assert (labels[-1] == "3 others") is (trials == 11)
    (figure,) = block.figures  # the store knows the objective only
    assert figure.title == "validation accuracy"
    assert len(figure.spec["data"]) == trials


def test_lines_of_published_rows_are_called_what_the_report_calls_them() -> None:
    """In the order in which it lists them; where something else is searched, by their values."""
    rows = [
        row(number, params={"optimizer.lr": lr}, accuracy=lr, history={1: 0.1, 2: lr})
        for number, lr in enumerate((0.25, 0.5))
    ]
    sections: dict[str, Any] = {
        "reference": {
            "source": "R1",
            "trials": [
                {"params": {"optimizer.lr": 0.25}, "note": "baseline; overfits"},
                {"params": {"optimizer.lr": 0.5}, "note": "+ a larger rate; 0.5 to 0.6"},
            ],
        }
    }
    stepwise = made(*rows, search={"sampler": "reference"}, **sections)
    assert [line.label for line in curves(stepwise)] == ["baseline", "+ a larger rate"]
    grid = made(
        *rows,
        search={"sampler": "grid"},
        parameters={"optimizer.lr": [0.25, 0.5]},
        **sections,
    )
    assert [line.label for line in curves(grid)] == ["lr 0.25", "lr 0.5"]


def test_sizes_that_hardly_differ_are_no_figure() -> None:
    def named(largest: int) -> list[str]:
        data = made(
            *(
                row(
                    number,
                    params={"optimizer.lr": lr, "train.batch_size": 10 + number},
                    accuracy=lr,
                    model_parameters=size,
                )
                for number, (lr, size) in enumerate(((0.25, 1_191_170), (0.5, largest)))
            ),
            parameters={"optimizer.lr": [0.25, 0.5], "train.batch_size": [10, 11]},
        )
        return [figure.name for figure in factor_figures(data)]

    assert named(1_191_490) == []
    assert named(2_000_000) == ["trade-off-parameters"]


def test_a_diverged_grey_line_does_not_press_the_others_flat() -> None:
    def drawn(worst: float) -> tuple[dict[str, Any], str]:
        lines = [
            Curve(label="a", hint="a", series={"val_loss": {1: [2.0], 2: [1.0]}}),
            Curve(
                label="b", hint="b", series={"val_loss": {1: [2.0], 2: [worst]}}, highlighted=False
            ),
        ]
        block = curves_block(lines)
        assert block is not None
        return block.figures[0].spec["layout"]["yaxis"], block.caption

    axis, caption = drawn(20.0)
    assert axis["range"] == pytest.approx([0.9, 2.1])
    assert "double click" in caption
    axis, caption = drawn(3.0)
    assert "range" not in axis
    assert caption == ""


def test_a_studied_value_that_diverged_leaves_the_figure_one_that_learns_nothing_stays() -> None:
    def drawn(worst: float) -> dict[str, Any]:
        block = curves_block(
            [
                Curve(label=str(index), hint="", series={"train_loss": {1: [0.5], 2: [last]}})
                for index, last in enumerate((0.01, 0.02, worst))
            ]
        )
        assert block is not None
        axis: dict[str, Any] = block.figures[0].spec["layout"]["yaxis"]
        return axis

    assert "range" not in drawn(2.3)
    assert drawn(5e15)["range"][1] < 1


def test_values_that_are_not_finite_leave_a_gap() -> None:
    data = made(
        row(0, accuracy=0.5, history={1: float("nan"), 2: 0.4, 3: float("inf"), 4: 0.5}),
    )
    block = curves_block(curves(data))
    assert block is not None
    assert block.figures[0].spec["data"][0]["x"] == [2, 4]


def test_one_epoch_is_no_curve() -> None:
    assert curves_block(curves(made(row(0, accuracy=0.5, history={1: 0.5})))) is None


def test_long_names_of_workers_keep_their_ends_and_stay_apart() -> None:
    long = "a-very-long-host-name-in-a-cluster"
    figure = timeline(made(row(0, worker=f"{long}-1"), row(1, worker=f"{long}-2")))
    assert figure is not None
    assert figure.spec["data"][0]["y"] == ["…me-in-a-cluster-1", "…me-in-a-cluster-2"]
    alike = timeline(made(row(0, worker=f"1{long}"), row(1, worker=f"2{long}")))
    assert alike is not None
    assert alike.spec["data"][0]["y"] == ["worker 1", "worker 2"]
    assert html.escape("<") in str(timeline(made(row(0, worker="<"))))


def test_a_bar_of_the_timeline_has_its_trials_number_and_the_rest_on_hover() -> None:
    figure = timeline(made(row(0, accuracy=0.5), row(1, accuracy=0.6)))
    assert figure is not None
    (bars,) = figure.spec["data"]
    assert bars["text"] == ["0", "1"]
    assert [said.partition(":")[0] for said in bars["customdata"]] == ["trial 0", "trial 1"]


@pytest.mark.parametrize(
    ("minutes", "clock"), [(2, "%H:%M:%S"), (60, "%H:%M"), (3000, "%-d %b<br>%H:%M")]
)
def test_the_ticks_of_the_timeline_are_as_short_as_its_length_allows(
    minutes: int, clock: str
) -> None:
    figure = timeline(made(row(0), row(minutes)))
    assert figure is not None
    assert figure.spec["layout"]["xaxis"]["tickformat"] == clock


def test_optunas_own_logging_is_as_loud_afterwards_as_before(home: Home) -> None:
    before = optuna.logging.get_verbosity()
    optuna_figures(home.data("sweep"))
    assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_of_pruned_trials_those_that_came_furthest_are_among_the_best(direction: str) -> None:
    """Twelve, of which one is complete: of four epochs come four, those of two by their value."""
    sign = 1 if direction == "maximize" else -1
    rows = [
        row(
            number,
            params={"optimizer.lr": 0.1 + number, "train.batch_size": 10 + number},
            accuracy=0.9 if number == 5 else None,
            state="complete" if number == 5 else "pruned",
            outcome="completed" if number == 5 else "pruned",
            history=dict.fromkeys(range(1, 5 if number % 3 == 2 else 3), sign * number / 100),
        )
        for number in range(12)
    ]
    data = made(
        *rows,
        objective={"metric": "val_accuracy", "direction": direction},
        parameters={
            "optimizer.lr": {"low": 0.1, "high": 100.0},
            "train.batch_size": {"low": 1, "high": 100},
        },
    )
    shown = [line.label.split(",")[0] for line in curves(data) if line.highlighted]
    assert shown == [f"lr {0.1 + number:.4g}" for number in (5, 11, 8, 2, 10, 9, 7, 6)]

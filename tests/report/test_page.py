"""The page: everything is on it, nothing on it asks for anything, and no text becomes markup."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.conftest import CLASSES, HOSTILE, Home, made, row

from sweeper.errors import UsageError
from sweeper.report import study_page
from sweeper.report.collect import StudyData
from sweeper.report.compare import write_comparison
from sweeper.report.leaderboard import all_trials
from sweeper.report.render import render
from sweeper.report.summary import asked, best_configuration, headline
from sweeper.report.timeline import timeline
from sweeper.report.write import comparison_name, write_files, write_report
from sweeper.settings import Settings, run_key
from sweeper.tracking.history import RunRecord

Read = Callable[[str], StudyData]


class Outline(HTMLParser):
    """Tags with their attributes, visible text, and the content of scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag if tag in {"script", "style"} else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside] = data
        elif data.strip():
            self.text.append(data.strip())

    @property
    def said(self) -> str:
        return "\n".join(self.text)

    def figure(self, name: str) -> Any:
        """A figure as Plotly is given it."""
        return json.loads(self.scripts[f"{name}-data"])


@pytest.fixture
def page(home: Home, tmp_path: Path) -> Callable[..., Outline]:
    def write(name: str, **options: Any) -> Outline:
        report = write_report(home.data(name), home.settings, out=tmp_path / name, **options)
        return Outline(report.page.read_text("utf-8"))

    return write


def without_plotly(text: str) -> str:
    from plotly.offline import get_plotlyjs

    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "")


@pytest.mark.parametrize("name", ["factor", "sweep", "colour"])
def test_nothing_outside_the_page_is_asked_for(home: Home, tmp_path: Path, name: str) -> None:
    report = write_report(home.data(name), home.settings, out=tmp_path)
    text = without_plotly(report.page.read_text("utf-8"))
    found = Outline(text)
    for tag, attributes in found.tags:
        for attribute in ("src", "href", "action", "srcset", "data"):
            target = attributes.get(attribute)
            if target is not None:
                assert re.match(r"(data:image/png;base64,|#[a-z]+$|[a-z]+\.(csv|md|tex)$)", target)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert "url(" not in found.scripts["style"]
    assert "@import" not in found.scripts["style"]
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_every_link_to_a_file_leads_to_one(home: Home, tmp_path: Path) -> None:
    report = write_report(home.data("factor"), home.settings, out=tmp_path)
    names = {file.name for file in report.files}
    assert names == {
        "index.html",
        "table.md",
        "table.tex",
        "leaderboard.csv",
        "reference.csv",
        "trials.csv",
    }
    assert names == {file.name for file in tmp_path.iterdir()}
    found = Outline(report.page.read_text("utf-8"))
    links = {a["href"] for tag, a in found.tags if tag == "a" and "." in (a["href"] or "")}
    assert links == names - {"index.html"}


def test_hostile_text_is_shown_and_is_not_markup(page: Callable[..., Outline]) -> None:
    found = page("factor")
    assert HOSTILE in found.said  # the description, and the note of a published row
    assert "R9.9 <b>bold</b>" in found.said
    tags = {tag for tag, _ in found.tags}
    assert "b" not in tags
    assert [a.get("src", "")[:10] for tag, a in found.tags if tag == "img"].count("http://evi") == 0
    assert len([tag for tag, a in found.tags if tag == "script" and "type" not in a]) == 2


def test_hostile_class_names_reach_plotly_as_text(page: Callable[..., Outline]) -> None:
    found = page("colour")
    names = [html.escape(name, quote=False) for name in CLASSES]
    assert sorted(found.figure("confusion")["data"][0]["x"]) == sorted(
        name.replace("/", "∕") for name in names
    )
    assert "i" not in {tag for tag, _ in found.tags}


def test_the_first_screen_says_what_was_asked_and_what_came_out(
    page: Callable[..., Outline], data: Read
) -> None:
    found = page("factor", with_model=False)
    best = data("factor").ranked[0]
    reached = best.objective()
    assert reached is not None
    head = found.said.split("Leaderboard")[0]
    assert f"Patch {best.params['model.patch']} is the best of 2 values: val accuracy" in head
    assert f"{reached.mean:.4f} ± {reached.deviation:.4f} over 2 seeds" in head
    assert "4 of 4" in head
    first = found.said.split("Training curves")[1]
    assert "maximize val accuracy (best epoch)" in first
    assert "model.patch: 2, 4" in first
    assert "1 of 2 published rows measured after 3 epochs of at most 300 training images; " in first
    assert first.index("Reported in R9.9") < first.index("Asked")


def test_curves_have_a_line_for_each_value_of_the_factor(page: Callable[..., Outline]) -> None:
    found = page("factor", with_model=False)
    for metric in ("train-loss", "val-loss", "train-accuracy", "val-accuracy"):
        lines = [t for t in found.figure(f"curves-{metric}")["data"] if "name" in t]
        assert [line["name"] for line in lines] == ["patch 2", "patch 4"]
        assert all(line["x"] == [1, 2, 3] for line in lines)
    pressed = [a for tag, a in found.tags if tag == "button" and "data-line" in a]
    assert [a["data-line"] for a in pressed] == ["line0", "line1"]


def test_a_curve_is_the_mean_over_the_seeds(page: Callable[..., Outline], data: Read) -> None:
    study = data("factor")
    config = next(each for each in study.found if each.params["model.patch"] == 4)
    wanted = [
        sum(study.history(trial, "val_loss")[epoch] for trial in config.rows) / 2
        for epoch in (1, 2, 3)
    ]
    drawn = page("factor", with_model=False).figure("curves-val-loss")["data"]
    line = next(trace for trace in drawn if trace.get("name") == "patch 4")
    assert line["y"] == pytest.approx(wanted, rel=1e-5)


def test_a_factor_is_drawn_against_size_time_and_accuracy(page: Callable[..., Outline]) -> None:
    found = page("factor", with_model=False)
    sizes = found.figure("factor-parameters")["data"][0]
    assert sizes["x"] == [2, 4]
    assert all(size > 100 for size in sizes["y"])
    times = found.figure("factor-seconds")["data"]
    assert [trace["name"] for trace in times] == ["training", "validation"]
    reached = found.figure("factor-accuracy")["data"]
    assert [trace["name"] for trace in reached] == ["training", "validation", "test"]


def test_what_failed_and_why_is_told_once_for_each_error(page: Callable[..., Outline]) -> None:
    found = page("sweep", with_model=False)
    summaries = [line for line in found.text if "ZeroDivisionError" in line and "trials (" in line]
    assert len(summaries) == 1
    assert summaries[0].endswith("ZeroDivisionError: this model fails on purpose")
    assert "crashed (failed)" in found.text
    assert any("Traceback (most recent call last)" in line for line in found.text)


def test_the_timeline_has_a_lane_a_worker_and_the_state_of_every_attempt(
    page: Callable[..., Outline],
) -> None:
    bars = page("sweep", with_model=False).figure("timeline")["data"]
    assert {bar["name"] for bar in bars} == {"complete", "failed"}
    assert {lane for bar in bars for lane in bar["y"]} == {"worker &lt;1&gt;"}
    assert sum(len(bar["x"]) for bar in bars) == 6


def test_the_headline_says_whom_the_seeds_hardly_tell_from_the_best() -> None:
    def said(other: float) -> str:
        runs = ((8, 0, 0.9), (8, 1, 0.8), (16, 0, other), (16, 1, other))
        return headline(
            made(
                *(
                    row(
                        number,
                        params={"model.width": width, "train.seed": seed},
                        accuracy=reached,
                    )
                    for number, (width, seed, reached) in enumerate(runs)
                ),
                parameters={"model.width": [8, 16], "train.seed": [0, 1]},
            )
        )

    assert said(0.8).endswith(" 1 other is within its standard deviation.")
    assert "within" not in said(0.7)


@pytest.mark.parametrize(
    ("sections", "section", "text"),
    [
        ({}, "optimizer", "adam by default"),
        ({"optimizer": {"lr": 0.1}}, "optimizer", "adam by default, lr 0.1"),
        ({"optimizer": {"name": "sgd"}}, "optimizer", "sgd"),
        ({"parameters": {"optimizer.lr": [0.1, 0.2]}}, "optimizer", "adam by default"),
        (
            {"parameters": {"optimizer.name": ["sgd", "adam"]}},
            "optimizer",
            "defaults, but for what is searched",
        ),
        ({"parameters": {"model": ["mlp", {"name": "mlp", "width": 8}]}}, "model", "searched"),
        ({}, "train", "defaults"),
        ({"parameters": {"train.seed": [0, 1]}}, "train", "defaults, but for what is searched"),
    ],
)
def test_what_a_section_leaves_to_its_defaults_is_not_said_to_be_searched(
    sections: dict[str, Any], section: str, text: str
) -> None:
    said = dict(asked(made(row(0, accuracy=0.5), **sections)).facts)
    assert said[section] == (text,)


def test_trials_that_a_person_chose_are_told_from_the_samplers() -> None:
    given = row(1, accuracy=0.6, given=("optimizer.lr",))
    sections: dict[str, Any] = {"parameters": {"optimizer.lr": [0.1, 0.2]}}
    rows = (row(0, accuracy=0.5), given, row(2, state="retried", given=("optimizer.lr",)))
    (without,) = dict(asked(made(row(0, accuracy=0.5), **sections)).facts)["how"]
    (said,) = dict(asked(made(*rows, **sections)).facts)["how"]
    assert "person" not in without
    assert said.endswith("2 trials, 1 of them with values that a person gave (sweeper enqueue)")


def test_a_study_that_is_over_does_not_promise_a_result() -> None:
    diverged = row(0, state="pruned", outcome="diverged")
    crashed = row(1, state="failed", outcome="out_of_memory")
    assert headline(made()) == "No trial has completed yet."
    assert headline(made(diverged, row(1, state="running"))) == "No trial has completed yet."
    assert headline(made(diverged, diverged, crashed, row(2, state="retried"))) == (
        "No trial has completed: 2 diverged, 1 out of memory."
    )


def test_epochs_of_several_objectives_are_the_trackers() -> None:
    """The store keeps none of them; without the tracker nobody knows, and nothing is invented."""

    def said(data: StudyData) -> tuple[list[str], str, str]:
        table = all_trials(data)
        at = [column.title for column in table.columns].index("epochs")
        best, lanes = best_configuration(data), timeline(data)
        assert best is not None
        assert lanes is not None
        epochs = [cells[at].text for cells in table.rows]
        return epochs, dict(best.facts)["best epoch"][0], lanes.spec["data"][0]["customdata"][0]

    data = made(
        row(0, values=(0.9, 0.1), metrics={"best_epoch": 3.0}, epoch=None),
        row(1, state="retried", outcome="lost", epoch=None),
        objective=["val_accuracy", "val_loss"],
    )
    run = RunRecord(
        run_id="r",
        status="FINISHED",
        tags={},
        history={"train_loss": dict.fromkeys(range(1, 5), 1)},
    )
    told = replace(data, runs={run_key("small", 0): run, run_key("small", 1): run})
    epochs, best, bar = said(told)
    assert (epochs, best) == (["4", "–"], "3 of 4")
    assert "val accuracy 0.9000 after 4 epochs" in bar
    epochs, best, bar = said(data)
    assert (epochs, best) == (["–", "–"], "3")
    assert "val accuracy 0.9000<br>" in bar


def test_numbers_have_an_origin(page: Callable[..., Outline]) -> None:
    said = page("factor", with_model=False).said.split("Where the numbers come from")[-1]
    for wanted in ("sweeper launch factor.yaml", "torch", "optuna", "hardware", "name: factor"):
        assert wanted in said


def test_the_best_model_has_its_pictures_and_mistakes(
    page: Callable[..., Outline], data: Read
) -> None:
    found = page("factor")
    best = data("factor").now.best
    assert best is not None
    matrix = found.figure("confusion")["data"][0]["text"]
    counts = [[int(cell or 0) for cell in line] for line in matrix]
    right = sum(counts[k][k] for k in range(10)) / sum(map(sum, counts))
    assert right == pytest.approx(best.metrics["test_accuracy"])
    alts = [a["alt"] or "" for tag, a in found.tags if tag == "img"]
    assert "token-mixing weights of 6 hidden units, 2×2 each" in alts
    assert sum("taken for" in alt for alt in alts) == 24


def test_data_that_are_not_here_cost_the_predictions_and_one_line(
    home: Home, tmp_path: Path
) -> None:
    root = home.settings.home / "pictures"
    away = root.rename(root.with_name("elsewhere"))
    try:
        report = write_report(home.data("colour"), home.settings, out=tmp_path)
    finally:
        away.rename(root)
    found = Outline(report.page.read_text("utf-8"))
    assert any(line.startswith("No predictions: ") for line in found.text)
    assert "First layer: 8 kernels of 3×3" in found.text
    assert report.model is None


def test_without_the_tracker_the_store_is_drawn_and_the_page_says_so(
    home: Home, tmp_path: Path
) -> None:
    data = home.data("factor")
    silent = replace(data, runs={}, tracker_problem="MLflow cannot be read: it sleeps")
    report = write_report(silent, home.settings, out=tmp_path)
    found = Outline(report.page.read_text("utf-8"))
    assert "MLflow cannot be read: it sleeps. Shown is what the store has" in found.said
    assert "curves-val-accuracy-data" in found.scripts
    assert "curves-train-loss-data" not in found.scripts
    wanted = data.history(data.now.rows[0], "val_accuracy")
    assert silent.history(data.now.rows[0], "val_accuracy") == pytest.approx(wanted)


def test_an_error_in_one_section_costs_that_section(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr(study_page, "leaderboard", broken)
    made_page = study_page.study_page(home.data("factor"), home.settings, with_model=False).page
    found = Outline(render(made_page))
    assert f"could not be made: ZeroDivisionError: {HOSTILE}" in found.said
    assert "curves-val-loss-data" in found.scripts


@pytest.mark.parametrize(
    "rows",
    [
        (),
        (row(0, state="waiting", outcome=None, started=None, ended=None, worker=None),),
        (row(0, state="running", outcome=None, ended=None, seconds=None, params={"a.b": 1}),),
        (row(0, state="failed", outcome="lost"),),
        (row(0, accuracy=float("inf")),),
    ],
)
def test_a_study_without_results_has_a_page(rows: tuple[Any, ...], tmp_path: Path) -> None:
    settings = Settings.resolve(home=tmp_path, environment={})
    report = write_report(made(*rows), settings)
    assert report.page == tmp_path / "reports" / "small" / "index.html"
    found = Outline(report.page.read_text("utf-8"))
    assert not [line for line in found.text if "could not be made" in line]


def test_tables_can_be_read_aloud(page: Callable[..., Outline]) -> None:
    found = page("factor", with_model=False)
    heads = [attributes for tag, attributes in found.tags if tag == "th"]
    assert heads
    assert all(a.get("scope") in {"col", "colgroup", "row"} for a in heads)
    captions = [tag for tag, _ in found.tags if tag == "caption"]
    assert len(captions) == len([tag for tag, _ in found.tags if tag == "table"])
    assert all(a.get("alt") for tag, a in found.tags if tag == "img")


def test_several_studies_are_one_table_and_their_best_curves(home: Home, tmp_path: Path) -> None:
    studies = [home.data("factor"), home.data("sweep")]
    report = write_comparison(studies, replace(home.settings, home=tmp_path))
    assert report.folder == tmp_path / "reports" / "compare-factor-sweep"
    found = Outline(without_plotly(report.page.read_text("utf-8")))
    lines = [t for t in found.figure("curves-val-loss")["data"] if "name" in t]
    assert [line["name"] for line in lines] == ["factor", "sweep"]
    rows = (report.folder / "studies.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in rows[1:]] == [
        ["factor", "digits", "mixer"],
        ["sweep", "digits", "mlp"],
    ]


def test_names_of_comparisons_fit_a_file_system() -> None:
    names = [f"{'x' * 90}{index}" for index in range(9)]
    assert len(comparison_name(names)) <= 120
    assert comparison_name(names) != comparison_name(names[::-1])
    assert comparison_name(["a", "b"]) == "compare-a-b"


def test_a_report_is_replaced_whole(tmp_path: Path) -> None:
    write_files(tmp_path / "new", {"index.html": "one"})
    write_files(tmp_path / "new", {"index.html": "two"})
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["index.html"]
    assert (tmp_path / "new/index.html").read_text() == "two"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        write_files(tmp_path / "file", {"index.html": "x"})


def test_a_support_vector_machine_has_no_weights_and_nothing_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    svm = {"data": {"name": "circles"}, "model": {"name": "svm"}}
    settings = Settings.resolve(home=tmp_path, environment={})
    report = write_report(made(row(0, accuracy=0.9), **svm), settings)
    said = Outline(report.page.read_text(encoding="utf-8")).said
    assert "Trial 0 is a support vector machine: no weights are kept." in said
    assert report.model is None
    assert not [record for record in caplog.records if "best model" in record.getMessage()]

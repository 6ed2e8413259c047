"""What a person asks of a study that is there: to pause, to stop, to take more trials."""

from __future__ import annotations

from typing import Any

import pytest
from cli.conftest import Sweeper


@pytest.fixture
def waiting(sweeper: Sweeper) -> Sweeper:
    """A study of three trials that no worker has taken yet."""
    sweeper.run("launch", sweeper.write(), "--detach")
    return sweeper


def test_what_was_enqueued_is_told_to_programs(sweeper: Sweeper) -> None:
    said = sweeper.json("launch", sweeper.write(), "--detach")
    assert said == {"study": "small", "enqueued": 3, "workers": 0}


def standing(sweeper: Sweeper) -> dict[str, Any]:
    (found,) = sweeper.json("status", "small")
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("word", ["pause", "stop", "cancel"])
def test_a_study_does_what_it_was_asked_last(waiting: Sweeper, word: str) -> None:
    assert standing(waiting)["control"] == "run"
    waiting.run(word, "small")
    assert standing(waiting)["control"] == word
    assert f"small is asked to {word}" in waiting.run("status")
    waiting.run("resume", "small")
    assert standing(waiting)["control"] == "run"


def test_nobody_takes_a_trial_of_a_paused_study(waiting: Sweeper) -> None:
    waiting.run("pause", "small")
    waiting.run("worker", "small")  # finds nothing that it may take, and ends
    assert standing(waiting)["trials"]["waiting"] == 3


def test_a_study_is_given_more_trials_without_its_file(waiting: Sweeper) -> None:
    said = waiting.run("extend", "small", "2")
    assert said == "small: a budget of 5 trials, 2 more\n"
    waiting.run("pause", "small")
    said = waiting.run("extend", "small", "1")
    assert said.endswith("small is asked to pause: sweeper resume small\n")
    found = standing(waiting)
    assert (found["budget"], found["trials"]["waiting"], found["control"]) == (6, 6, "pause")
    said = waiting.run("launch", waiting.folder / "study.yaml", "--detach", code=2)
    assert "search.trials: 6 → 3" in said
    assert "--trials 6" in said
    waiting.run("launch", waiting.folder / "study.yaml", "--detach", "--trials", "6")
    assert standing(waiting)["trials"]["waiting"] == 6


@pytest.mark.parametrize("sampler", ["grid", "reference"])
def test_a_study_that_knows_its_trials_takes_no_more(sweeper: Sweeper, sampler: str) -> None:
    search = {"sampler": sampler}
    parameters = {"optimizer.lr": [0.001, 0.01]}
    reference = {"source": "r", "trials": [{"params": {"optimizer.lr": 0.01}}]}
    file = sweeper.write(search=search, parameters=parameters, reference=reference)
    sweeper.run("launch", file, "--detach")
    before = standing(sweeper)
    said = sweeper.run("extend", "small", "2", code=2)
    assert sampler in said
    assert standing(sweeper) == before


@pytest.mark.parametrize("words", [("small", "0"), ("small", "-1"), ("small", "x"), ("smal", "1")])
def test_what_cannot_be_added_changes_nothing(waiting: Sweeper, words: tuple[str, str]) -> None:
    said = waiting.run("extend", *words, code=2)
    assert "small" in said if words[0] == "smal" else "N" in said
    assert standing(waiting)["budget"] == 3


def test_a_trial_of_a_persons_choice_comes_before_the_samplers(waiting: Sweeper) -> None:
    said = waiting.run("enqueue", "small", "optimizer.lr=2e-3")
    assert said == "small: trial 0 with optimizer.lr = 0.002\n"
    waiting.run("pause", "small")
    found = waiting.json("enqueue", "small", "optimizer.lr=0.003")
    assert found == {
        "study": "small",
        "number": 1,
        "params": {"optimizer.lr": 0.003},
        "open": [],
        "control": "pause",
    }
    said = waiting.run("enqueue", "small", "optimizer.lr=0.002", code=2)
    assert "has a trial of these values already" in said
    waiting.run("resume", "small")
    waiting.run("worker", "small")
    rows = waiting.json("trials", "small")
    assert [row["state"] for row in rows] == ["complete"] * 5
    assert [row["params"]["optimizer.lr"] for row in rows[:2]] == [0.002, 0.003]
    assert [row["given"] for row in rows] == [["optimizer.lr"]] * 2 + [[]] * 3


def test_a_grid_has_all_its_points_and_no_sampler_to_complete_one(sweeper: Sweeper) -> None:
    parameters = {
        "model.name": ["mlp"],
        "optimizer.lr": [0.001, 0.01],
        "model.width": [16, 32],
    }
    file = sweeper.write(search={"sampler": "grid"}, parameters=parameters)
    sweeper.run("launch", file, "--detach")
    said = sweeper.run("enqueue", "small", "optimizer.lr=0.01", code=2)
    assert "'grid', which chooses nothing; give model.name, model.width" in said
    words = ("optimizer.lr=0.01", "model.width=32", "model.name=mlp")
    said = sweeper.run("enqueue", "small", *words, code=2)
    assert "has a trial of these values already" in said
    assert standing(sweeper)["budget"] == 4

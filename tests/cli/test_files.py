"""Commands about study files, typed as a person types them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.conftest import Sweeper
from report.conftest import made, row
from rich.console import Console

from sweeper.cli.printing import trial_table

SIX = """\
name: broken
data: {name: cifar10}
model: {name: mixer, patch: 5}
optimizer: {name: adma, lr: -1}
train: {epochs: many}
search: {trials: 3, samplr: tpe}
parameters:
  optimizer.momentm: [0.1]
"""


def test_six_mistakes_are_six_lines(sweeper: Sweeper, yaml_file: Callable[[str], Path]) -> None:
    file = yaml_file(SIX)
    lines = sweeper.run("validate", file, code=2).strip().splitlines()
    places = [line.removeprefix(f"{file}:").split(":")[0] for line in lines]
    assert places == ["3", "4", "4", "5", "6", "8"]
    assert "did you mean 'adam'" in lines[1]
    assert "did you mean 'sampler'" in lines[4]


def test_mistakes_as_json(sweeper: Sweeper, yaml_file: Callable[[str], Path]) -> None:
    process = sweeper.start("validate", str(yaml_file(SIX)), "--json")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    found = json.loads(out)
    assert len(found) == 6
    assert all(set(item) == {"file", "line", "column", "path", "message"} for item in found)


def test_a_broken_file_is_not_launched(sweeper: Sweeper, yaml_file: Callable[[str], Path]) -> None:
    said = sweeper.run("launch", yaml_file(SIX), code=2)
    assert said.count("broken.yaml:") == 6
    assert not (sweeper.folder / ".sweeper").exists()


def test_a_valid_file_is_named(sweeper: Sweeper) -> None:
    assert "valid" in sweeper.run("validate", sweeper.write())
    assert sweeper.json("validate", sweeper.folder / "study.yaml") == []


def test_plan_counts_trials_and_parameters(sweeper: Sweeper) -> None:
    plan = sweeper.json("plan", sweeper.write())
    assert plan["trials"] == 3
    assert set(plan["parameters"]) == {"optimizer.lr"}
    count = 64 * 16 + 16 + 170
    assert plan["model_parameters"] == {"smallest": count, "largest": count}
    assert len(plan["first"]) == 3
    assert plan["seconds"] > 0


@pytest.mark.parametrize(
    ("asked", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")]
)
def test_torch_does_not_keep_cores_busy_with_waiting(
    sweeper: Sweeper, asked: dict[str, str], found: str
) -> None:
    kept = {name: each for name, each in sweeper.environment.items() if name != "OMP_WAIT_POLICY"}
    said = subprocess.run(
        [sys.executable, "-m", "sweeper", "plan", sweeper.write()],
        env={**kept, **asked, "OMP_DISPLAY_ENV": "true"},  # OpenMP tells as torch loads it
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert f"OMP_WAIT_POLICY = '{found}'" in said


def test_plan_of_one_configuration_has_one_count(sweeper: Sweeper) -> None:
    file = sweeper.write(parameters={}, search={"trials": 1})
    plan = sweeper.json("plan", file, "--set", "model.width=32")
    assert plan["model_parameters"] == {"smallest": 2410, "largest": 2410}
    assert plan["trials"] == 1


@pytest.mark.parametrize(("patch", "parameters"), [(4, 2_188_298), (8, 2_175_818), (16, 2_310_938)])
def test_the_mixer_of_report_r4_has_the_reports_size(
    sweeper: Sweeper, patch: int, parameters: int
) -> None:
    formula = 768 * patch**2 + 4 * (263168 / patch**2 + 526720) + 3338
    assert formula == parameters
    file = sweeper.write(
        data={"name": "cifar10"}, model={"name": "mixer", "patch": patch}, parameters={},
        search={"trials": 1},
    )  # fmt: skip
    found = sweeper.json("plan", file)["model_parameters"]
    assert found == {"smallest": parameters, "largest": parameters}


def test_dry_run_lists_several_studies_and_runs_none(sweeper: Sweeper) -> None:
    first, second = sweeper.write(), sweeper.write("other.yaml", name="other")
    lines = sweeper.run("launch", first, second, "--dry-run").splitlines()
    assert [line.split(":")[0] for line in lines] == ["small", "other", "2 studies"]
    assert "3 trials, about" in lines[0]
    assert lines[2].startswith("2 studies: 6 trials, about ")
    assert not (sweeper.folder / ".sweeper").exists()


def test_one_trial_of_unknown_length_is_said_so(sweeper: Sweeper) -> None:
    file = sweeper.write(
        data={"name": "circles"}, model={"name": "svm"}, parameters={}, search={"trials": 1},
        train={"epochs": 1},
    )  # fmt: skip
    lines = sweeper.run("launch", file, sweeper.write("b.yaml", name="b"), "--dry-run").splitlines()
    assert lines[0] == "small: 1 trial, time unknown, with 1 worker"


def test_a_plan_has_values_in_words_not_in_json(sweeper: Sweeper) -> None:
    augment = [[], ["flip"], [{"name": "crop", "size": 8, "padding": 1}, "flip"]]
    file = sweeper.write(parameters={"data.augment": augment}, search={"sampler": "grid"})
    said = sweeper.run("plan", file)
    assert "none | flip | crop (size 8, padding 1) + flip" in said
    assert "2: data.augment=crop (size 8, padding 1) + flip" in said


def test_trials_are_listed_in_words_not_in_json() -> None:
    augment = [{"name": "crop", "size": 28, "padding": 0}, "flip"]
    schedule = {"name": "exponential", "gamma": 0.9}
    data = made(row(0, params={"data.augment": augment, "optimizer.schedule": schedule}))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(trial_table(data.now.spec, data.now.rows, "t"))
    said = console.export_text()
    assert "crop (size 28, padding 0) + flip" in said
    assert "exponential (gamma 0.9)" in said


def test_init_writes_a_file_that_is_valid_and_never_overwrites(sweeper: Sweeper) -> None:
    sweeper.run("init", "mine.yaml")
    assert "valid" in sweeper.run("validate", "mine.yaml")
    assert "there already" in sweeper.run("init", "mine.yaml", code=2)


def test_schema_is_a_json_schema(sweeper: Sweeper) -> None:
    schema = json.loads(sweeper.run("schema"))
    assert schema["properties"]["search"]


@pytest.mark.parametrize("words", [["--help"], ["validate", "study.yaml"], ["status", "--help"]])
def test_light_commands_load_neither_torch_nor_mlflow(sweeper: Sweeper, words: list[str]) -> None:
    sweeper.write()
    code = (
        "import sys\n"
        f"sys.argv = ['sweeper', *{words!r}]\n"
        "from sweeper.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'numpy', 'pandas'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sweeper.folder,
        env=sweeper.environment,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["best", "nothing"], "nothing"),
        (["launch", "missing.yaml"], "missing.yaml"),
        (["status", "--store", "mysql://host/db"], "SQLite or PostgreSQL"),
        (["launch", "study.yaml", "--set", "train.epoks=3"], "epochs"),
        (["launch", "study.yaml", "--set", "nonsense"], "--set"),
    ],
)
def test_wrong_usage_is_exit_code_two(sweeper: Sweeper, words: list[str], part: str) -> None:
    sweeper.write()
    assert part in sweeper.run(*words, code=2)


def test_a_store_out_of_reach_is_exit_code_three(sweeper: Sweeper) -> None:
    said = sweeper.run("status", "--store", "postgresql+psycopg://me@127.0.0.1:1/none", code=3)
    assert "127.0.0.1:1" in said


def test_a_password_on_the_command_line_is_refused_and_not_repeated(sweeper: Sweeper) -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/none"
    said = sweeper.run("status", "--store", url, code=2)
    assert "PGPASSWORD" in said
    assert "secret@" not in said


def test_doctor_says_what_it_found(sweeper: Sweeper) -> None:
    said = sweeper.run("doctor")
    for subject in (
        "versions",
        "home",
        "store",
        "mlflow",
        "checkpoints",
        "device",
        "data",
        "spool",
    ):
        assert subject in said
    assert {item["verdict"] for item in sweeper.json("doctor")} <= {"good", "note"}


def test_doctor_knows_what_waits_and_what_was_refused(sweeper: Sweeper) -> None:
    spool = sweeper.folder / ".sweeper" / "spool"
    spool.mkdir(parents=True)
    (spool / "sent.jsonl").write_text('{"n": 1}\n')
    (spool / "sent.shipped").write_text("9")
    refused = spool / "sent.rejected.jsonl"
    refused.write_text('{"experiment": "small", "key": "small/0", "reason": "too long"}\n')
    first, second = [item for item in sweeper.json("doctor") if item["subject"] == "spool"]
    assert (first["verdict"], first["found"]) == ("good", "nothing waits for MLflow")
    assert second["found"] == f"{refused} has 1 records that MLflow refused: too long"
    assert "sweeper sync" in second["advice"]
    (spool / "sent.shipped").write_text("0")
    first, _ = [item for item in sweeper.json("doctor") if item["subject"] == "spool"]
    assert first["found"] == "1 journals wait for MLflow"

"""``sweeper launch`` with real workers, a real MLflow server and real signals."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli.conftest import Sweeper, workers_of

pytestmark = pytest.mark.mlflow

Launched = tuple[Sweeper, dict[str, Any]]
SLOW = {"train": {"epochs": 400, "batch_size": 10}}


def wait_for(condition: Any, timeout_s: float = 90) -> Any:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.2)
    raise TimeoutError("it did not happen")


def running(sweeper: Sweeper, epoch: int = 1) -> list[Any]:
    """Running trials that have reached ``epoch``, read from the store itself."""
    from sweeper.store import open_store, standing, studies

    if not (sweeper.folder / ".sweeper/optuna.db").exists():
        return []
    store = open_store(f"sqlite:///{sweeper.folder}/.sweeper/optuna.db")
    try:
        if "small" not in studies.names(store):
            return []
        rows = standing(store, studies.load(store, "small")).rows
    finally:
        store.close()
    return [row for row in rows if row.state == "running" and (row.epoch or 0) >= epoch]


def test_the_result_is_one_json_object(launched: Launched) -> None:
    _sweeper, result = launched
    assert set(result) >= {
        "study", "trials", "best", "tracking_uri", "experiment_id", "seconds",
    }  # fmt: skip
    assert result["study"] == "small"
    assert result["trials"]["complete"] == 3
    assert sum(result["trials"].values()) == 3
    assert set(result["best"]) >= {"number", "params", "metrics"}
    assert 0 < result["best"]["metrics"]["test_accuracy"] <= 1
    assert result["seconds"] > 0


def test_a_copy_of_the_files_alone_has_all_of_it(launched: Launched, tmp_path: Path) -> None:
    """SQLite keeps what was written last beside its files until somebody puts it in."""
    sweeper, _result = launched
    found = {}
    for name, query in (
        ("optuna.db", "SELECT state, count(*) FROM trials GROUP BY state"),
        ("mlflow.db", "SELECT status, count(*) FROM runs GROUP BY status"),
    ):
        shutil.copy(sweeper.folder / ".sweeper" / name, tmp_path / name)
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as connection:
            found[name] = connection.execute(query).fetchall()
    assert found == {"optuna.db": [("COMPLETE", 3)], "mlflow.db": [("FINISHED", 4)]}


def test_every_trial_is_a_finished_run(launched: Launched) -> None:
    from mlflow import MlflowClient

    _, result = launched
    client = MlflowClient(result["tracking_uri"])
    runs = client.search_runs([result["experiment_id"]])
    trials = {run.info.run_name: run for run in runs if run.data.tags["sweeper.role"] == "trial"}
    assert sorted(trials) == ["0000", "0001", "0002"]
    for run in trials.values():
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "val_accuracy")) == 2
        assert run.data.params["model.width"] == "16"
        assert run.data.metrics["model_parameters"] == 64 * 16 + 16 + 170
        assert run.inputs.dataset_inputs[0].dataset.name == "digits"


def test_the_studys_own_run_has_spec_and_table(launched: Launched) -> None:
    from mlflow import MlflowClient

    _, result = launched
    client = MlflowClient(result["tracking_uri"])
    own = client.search_runs(
        [result["experiment_id"]], filter_string="tags.`sweeper.role` = 'study'"
    )
    assert len(own) == 1
    names = {file.path for file in client.list_artifacts(own[0].info.run_id)}
    assert {"spec.json", "trials.csv", "index.html", "table.md", "table.tex"} <= names


def test_the_report_is_written_and_named(launched: Launched) -> None:
    sweeper, result = launched
    assert Path(result["report"]) == sweeper.folder / ".sweeper/reports/small/index.html"
    page = Path(result["report"]).read_text("utf-8")
    assert "Confusion matrix" in page
    assert "could not be made" not in page


def test_the_best_model_loads_and_predicts(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import numpy as np

    monkeypatch.chdir(tmp_path)  # pyfunc opens a database of its own where it stands
    _, result = launched
    client = mlflow.MlflowClient(result["tracking_uri"])
    best = f"{result['best']['number']:04d}"
    run = client.search_runs(
        [result["experiment_id"]], filter_string=f"attributes.run_name = '{best}'"
    )[0]
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    loaded = mlflow.pyfunc.load_model(model.artifact_location)
    assert loaded.metadata.signature is not None
    assert loaded.predict(np.zeros((3, 1, 8, 8), np.float32)).shape == (3, 10)


def test_trials_have_the_stable_keys(launched: Launched) -> None:
    sweeper, _ = launched
    rows = sweeper.json("trials", "small")
    assert [row["number"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert set(row) >= {
            "number", "state", "params", "metrics", "seconds", "attempt", "run_id", "worker",
        }  # fmt: skip
        assert row["state"] == "complete"
        assert len(row["run_id"]) == 32


def test_status_and_best(launched: Launched) -> None:
    sweeper, result = launched
    assert sweeper.json("status")[0]["trials"] == result["trials"]
    best = sweeper.json("best", "small")
    assert best["number"] == result["best"]["number"]
    assert best["config"]["optimizer"]["lr"] == best["params"]["optimizer.lr"]
    assert "small" in sweeper.run("status")
    assert " lr " in sweeper.run("trials", "small")
    assert "test_accuracy" in sweeper.run("best", "small")


def test_sync_ends_the_run_of_a_worker_that_was_killed_once_it_had_told_the_store(
    launched: Launched,
) -> None:
    """Its last words to MLflow never came to be; what they would have said is in the store."""
    sweeper, _ = launched
    run_id = sweeper.json("trials", "small")[2]["run_id"]
    with contextlib.closing(sqlite3.connect(sweeper.folder / ".sweeper/mlflow.db")) as mlflow:
        for table in ("metrics", "latest_metrics"):
            mlflow.execute(
                f"DELETE FROM {table} WHERE run_uuid = ? AND key LIKE 'test%'", (run_id,)
            )
        mlflow.execute("DELETE FROM tags WHERE run_uuid = ? AND key = 'sweeper.outcome'", (run_id,))
        mlflow.execute("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", (run_id,))
        mlflow.commit()
    process = sweeper.start("doctor", "--study", "small")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "trial 2: its run lacks the metric test_accuracy" in said
    assert ", 1 runs ended for workers that could not" in sweeper.run("sync")
    assert "agree on all 3 trials" in sweeper.run("doctor", "--study", "small")


def test_store_and_mlflow_agree_until_somebody_meddles(launched: Launched) -> None:
    from mlflow import MlflowClient

    sweeper, result = launched
    assert "agree on all 3 trials" in sweeper.run("doctor", "--study", "small")
    client = MlflowClient(result["tracking_uri"])
    experiment = result["experiment_id"]
    run_id = sweeper.json("trials", "small")[1]["run_id"]
    client.log_metric(run_id, "val_loss", 0.5, timestamp=1, step=2)
    client.set_terminated(run_id, "FAILED")
    alien = client.create_run(experiment, tags={"sweeper.role": "trial", "sweeper.key": "small/77"})
    process = sweeper.start("doctor", "--study", "small")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "trial 1: MLflow has val_loss more than once at the epochs [2]" in said
    assert "trial 1: it is complete in the store, but its run is FAILED" in said
    assert f"the run {alien.info.run_id} (small/77) belongs to no trial" in said
    client.delete_run(alien.info.run_id)
    client.set_terminated(run_id, "FINISHED")


def test_nothing_is_left_running(launched: Launched) -> None:
    sweeper, _ = launched
    left = [
        process.cmdline()
        for process in psutil.process_iter(["cwd"])
        if process.info["cwd"] == str(sweeper.folder) and process.status() != "zombie"
    ]
    assert left == []


def test_a_study_that_is_refused_is_so_before_another_is_trained(launched: Launched) -> None:
    sweeper, _ = launched
    changed = sweeper.write("changed.yaml", train={"epochs": 3})
    said = sweeper.run("launch", sweeper.write("new.yaml", name="new"), changed, code=2)
    assert "train.epochs: 2 → 3" in said
    assert "new" not in [standing["study"] for standing in sweeper.json("status")]


def test_what_is_done_is_told_though_a_later_study_fails(launched: Launched) -> None:
    sweeper, result = launched
    later = sweeper.write("later.yaml", name="later", model={"name": "own_models:broken"})
    launch = sweeper.start("launch", sweeper.folder / "study.yaml", later, "--json")
    out, err = launch.communicate(timeout=240)
    assert launch.returncode == 1, err
    assert "this model fails on purpose" in err
    assert [done["best"] for done in json.loads(out)] == [result["best"]]


def test_launching_again_resumes_and_a_change_is_refused(launched: Launched) -> None:
    sweeper, result = launched
    file = sweeper.folder / "study.yaml"
    again = sweeper.json("launch", file)
    assert again["trials"] == result["trials"]
    assert again["best"] == result["best"]

    said = sweeper.run("launch", file, "--set", "train.epochs=3", code=2)
    assert "train.epochs: 2 → 3" in said
    said = sweeper.run("launch", file, "--trials", "4", code=2)
    assert "--extend" in said
    more = sweeper.json("launch", file, "--trials", "4", "--extend")
    assert more["trials"]["complete"] == 4


def test_a_later_study_of_the_same_name_has_runs_of_its_own(sweeper: Sweeper) -> None:
    """As after the store was deleted, or as of another store with the same MLflow server."""
    file = sweeper.write(search={"trials": 1, "sampler": "random"})
    sweeper.run("launch", file)
    [first] = sweeper.json("trials", "small")
    for part in (sweeper.folder / ".sweeper").glob("optuna.db*"):
        part.unlink()
    sweeper.run("launch", file, "--set", "train.seed=3")
    [second] = sweeper.json("trials", "small")
    assert {first["run_id"], second["run_id"]} == set(run_ids(sweeper))
    assert "agree" in sweeper.run("doctor", "--study", "small")
    page = (sweeper.folder / ".sweeper" / "reports" / "small" / "index.html").read_text()
    assert second["run_id"] in page
    assert first["run_id"] not in page


def run_ids(sweeper: Sweeper) -> list[str]:
    """The runs of trials that MLflow has, and no run twice under one name of the model."""
    with contextlib.closing(sqlite3.connect(sweeper.folder / ".sweeper" / "mlflow.db")) as database:
        versions = database.execute("SELECT run_id FROM model_versions").fetchall()
        found = database.execute("SELECT run_uuid FROM tags WHERE key = 'sweeper.trial'").fetchall()
    assert sorted(versions) == sorted(found)
    return [run_id for (run_id,) in found]


def test_files_are_launched_one_after_the_other(sweeper: Sweeper) -> None:
    files = [sweeper.write(f"{name}.yaml", name=name) for name in ("one", "two", "three")]
    results = sweeper.json("launch", *files, "--workers", "1")
    assert [(result["study"], result["trials"]["complete"]) for result in results] == [
        ("one", 3),
        ("two", 3),
        ("three", 3),
    ]


def test_a_killed_worker_loses_nothing(sweeper: Sweeper) -> None:
    file = sweeper.write(search={"trials": 3, "sampler": "random"}, **SLOW)
    launch = sweeper.start("launch", file, "--workers", "2", "--json")
    wait_for(lambda: running(sweeper, epoch=5))
    worker = workers_of(psutil.Process(launch.pid))[0]
    worker.kill()
    wait_for(lambda: any(row.attempt > 1 for row in running(sweeper, epoch=0)))
    _out, err = launch.communicate(timeout=280)
    assert launch.returncode == 0, err
    rows = sweeper.json("trials", "small")
    assert [row["state"] for row in rows].count("complete") == 3
    assert [row["state"] for row in rows].count("retried") == 1
    assert next(row for row in rows if row["state"] == "retried")["outcome"] == "lost"
    assert "agree on all 3 trials" in sweeper.run("doctor", "--study", "small")
    assert not list((sweeper.folder / ".sweeper").glob("checkpoints/*"))


def test_interrupted_once_trials_go_back_and_a_launch_goes_on(sweeper: Sweeper) -> None:
    file = sweeper.write(search={"trials": 2, "sampler": "random"}, **SLOW)
    launch = sweeper.start("launch", file, "--workers", "2")
    wait_for(lambda: running(sweeper, epoch=2))
    launch.send_signal(signal.SIGINT)
    _, err = launch.communicate(timeout=90)
    assert launch.returncode == 130
    assert "launch it again to go on" in err
    rows = sweeper.json("trials", "small")
    assert {row["state"] for row in rows} <= {"waiting", "complete"}
    result = sweeper.json("launch", file, "--workers", "2")
    assert result["trials"]["complete"] == 2
    assert result["trials"]["retried"] == 0
    assert "agree on all 2 trials" in sweeper.run("doctor", "--study", "small")
    logs = (sweeper.folder / ".sweeper/logs/small").glob("*.log")
    assert any("goes on after epoch" in log.read_text() for log in logs)


def test_a_launch_whose_time_is_up_leaves_what_it_has_not_begun(sweeper: Sweeper) -> None:
    file = sweeper.write()
    other = sweeper.write("other.yaml", name="other")
    said = sweeper.run("launch", file, other, "--hours", "0", code=1)
    assert "other: not begun, the time that --hours gave is up" in said
    assert "no further trial was begun: the time that --hours gave is up" in said
    (standing,) = sweeper.json("status")
    assert standing["trials"]["waiting"] == standing["budget"] == 3
    assert (sweeper.folder / ".sweeper/reports/small/index.html").exists()
    said = sweeper.run("launch", file, "--hours", "1", "--detach", code=2)
    assert "--detach" in said
    result = sweeper.json("launch", file, "--hours", "1")
    assert (result["trials"]["complete"], result["stopped"]) == (3, None)


def test_workers_end_when_their_launch_is_killed(sweeper: Sweeper) -> None:
    file = sweeper.write(search={"trials": 1, "sampler": "random"}, **SLOW)
    launch = sweeper.start("launch", file, "--workers", "1", start_new_session=True)
    wait_for(lambda: running(sweeper, epoch=1))
    (worker,) = workers_of(psutil.Process(launch.pid))
    launch.kill()
    launch.communicate()
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running()
    assert sweeper.json("trials", "small")[0]["state"] in {"waiting", "complete"}


def test_missing_data_end_the_launch_with_what_to_do(sweeper: Sweeper, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for part in ("train", "test"):
        (root / part / "cat").mkdir(parents=True)
    file = sweeper.write(data={"name": "image_folder", "root": str(root)})
    said = sweeper.run("launch", file, "--workers", "1", code=2)
    assert "pictures" in said


def test_a_study_whose_trials_all_crash_alike_stops(sweeper: Sweeper) -> None:
    file = sweeper.write(
        model={"name": "own_models:broken"}, search={"trials": 20, "sampler": "random"}
    )
    said = sweeper.run("launch", file, "--workers", "2", code=1)
    assert "this model fails on purpose" in said
    assert "sweeper retry small" in said

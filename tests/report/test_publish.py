"""The report hangs on the study's own MLflow run, and the best model on its trial's."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.conftest import Home

from sweeper.errors import TrackerUnreachableError
from sweeper.report.publish import publish
from sweeper.report.write import write_report
from sweeper.settings import Settings, study_run_key
from sweeper.tracking import LocalServer, SpoolTracker, mlflow
from sweeper.tracking.history import records
from sweeper.tracking.journal import pending

pytestmark = pytest.mark.mlflow


def test_the_studys_run_has_the_report_and_the_best_trial_the_model(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalServer(home.settings) as server:
        data = home.data("colour")
        report = write_report(data, home.settings, out=tmp_path)
        publish(data, report, home.settings, server.ensure())

    client = mlflow.connect(home.settings.embedded_tracking_uri)
    own = records(home.settings, "colour")[study_run_key("colour")]
    assert own.status == "FINISHED"
    assert own.tags["sweeper.best_trial"] == "0"
    kept = {file.path for file in client.list_artifacts(own.run_id)}
    assert kept == {
        *("spec.json", "index.html", "table.md", "table.tex", "leaderboard.csv", "trials.csv"),
    }
    page = mlflow.download_artifact(client, own.run_id, "index.html", tmp_path / "again")
    assert page.read_bytes() == report.page.read_bytes()

    import mlflow as library
    import torch

    assert report.model is not None
    run_id = report.model.weights.run_id
    registered = client.search_model_versions(f"run_id = '{run_id}'")
    assert [version.name for version in registered] == ["colour"]
    outputs = client.get_run(run_id).outputs.model_outputs
    logged = client.get_logged_model(outputs[0].model_id)
    monkeypatch.chdir(tmp_path)  # where MLflow puts a database of its own as it loads
    loaded = library.pyfunc.load_model(logged.artifact_location)
    module, example = report.model.deployable()
    with torch.inference_mode():
        wanted = module(torch.from_numpy(example)).numpy()
    assert loaded.predict(example) == pytest.approx(wanted, abs=1e-5)


def test_a_report_read_again_knows_the_command_of_the_launch(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes the report later did not start the study."""
    from sweeper.report.collect import collect
    from sweeper.store import studies

    data = home.data("sweep")
    report = write_report(data, home.settings, out=tmp_path, with_model=False)
    monkeypatch.setattr("sys.argv", ["/bin/sweeper", "launch", "sweep.yaml"])
    publish(data, report, home.settings, home.settings.embedded_tracking_uri)
    monkeypatch.setattr("sys.argv", ["/bin/sweeper", "report", "sweep"])
    again = collect(home.store, studies.load(home.store, "sweep"), home.settings)
    assert again.command == "sweeper launch sweep.yaml"
    assert report.model is None


def test_a_report_that_mlflow_does_not_take_is_no_success(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(SpoolTracker):
        def flush(self, timeout_s: float) -> int:
            return super().flush(1.0)

        def close(self, timeout_s: float = 0.1) -> int:
            return super().close(timeout_s)

    monkeypatch.setattr("sweeper.report.publish.SpoolTracker", Impatient)
    data = home.data("sweep")
    report = write_report(data, home.settings, out=tmp_path, with_model=False)
    settings = Settings.resolve(home=tmp_path / "home", environment={})
    with pytest.raises(TrackerUnreachableError, match="Connection refused"):
        publish(data, report, settings, "http://127.0.0.1:9")
    assert pending(settings.spool)[0] == 1

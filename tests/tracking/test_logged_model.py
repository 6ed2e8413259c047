"""A logged model is loaded and asked by MLflow alone, and answers as the module did."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sweeper.settings import Settings
from sweeper.tracking import LocalServer
from sweeper.tracking import mlflow as server
from sweeper.tracking.model import LoggedModel, log_model

pytestmark = pytest.mark.mlflow

LOAD = """
import sys
import numpy as np, torch, mlflow
x, *places = np.load(sys.argv[1]), *sys.argv[2:]
for address, uri in zip(places[::2], places[1::2]):
    mlflow.set_tracking_uri(address)
    function = mlflow.pyfunc.load_model(uri)
    y = mlflow.pytorch.load_model(uri)(torch.from_numpy(x)).detach().numpy()
    assert np.array_equal(function.predict(x), y)
    assert function.metadata.signature.inputs.input_types() == [np.dtype("float32")]
    np.save(f"y{places.index(uri)}.npy", y)
print("sweeper" in sys.modules)
"""

MOODY = """
import torch
class Moody(torch.nn.Module):
    "Goes another way for other values, which no exported graph can."
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.Linear(144, 5)),
    )


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).random((count, 3, 8, 8), dtype=np.float32)


def new_run(address: str) -> str:
    client = server.connect(address)
    experiment = server.experiment_id(client, f"study-{uuid.uuid4().hex[:8]}")
    return server.create_run(client, experiment, name="0001", start_time_ms=1, tags={})


def answers(
    places: Sequence[tuple[str, str]], x: np.ndarray, folder: Path, *, pickle: bool = False
) -> list[np.ndarray]:
    """What MLflow answers in a process of its own, which does not know sweeper.

    ``places``: addresses and model URIs.
    """
    np.save(folder / "x.npy", x)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, "x.npy", *chain.from_iterable(places)],
        env={
            **os.environ,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": str(pickle).lower(),
            "PYTHONPATH": str(folder),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    return [np.load(folder / f"y{2 * index + 1}.npy") for index in range(len(places))]


def test_the_model_answers_the_same_without_sweeper_and_without_pickle(
    tmp_path: Path, nasty_folder: Path
) -> None:
    settings = Settings.resolve(home=nasty_folder, environment={})
    module = network()
    x = images(3)
    expected = module.eval()(torch.from_numpy(x)).detach().numpy()
    module.train()
    with LocalServer(settings) as local:
        address = local.ensure()
        client = server.connect(address)
        run_id = new_run(address)
        logged = log_model(client, run_id, module, images(2), registered_name="a study")
        assert module.training  # the module itself is left as it was
        assert (logged.format, logged.version) == ("pt2", "1")
        assert [o.model_id for o in server.get_run(client, run_id).outputs.model_outputs] == [
            logged.model_id
        ]
        found = answers(
            [(address, logged.uri), (settings.embedded_tracking_uri, "models:/a study/1")],
            x,
            tmp_path,
        )
    assert len(found) == 2
    for y in found:
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_a_run_has_one_model_and_one_version_of_it(mlflow_server: str) -> None:
    client, run_id = server.connect(mlflow_server), new_run(mlflow_server)
    name = f"study-{uuid.uuid4().hex[:8]}"
    first = log_model(client, run_id, network(), images(2), registered_name=name)
    again = log_model(client, run_id, network(), images(2), registered_name=name)
    assert (
        again
        == first
        == LoggedModel(
            model_id=first.model_id, uri=f"models:/{first.model_id}", version="1", format="pt2"
        )
    )
    other = log_model(client, new_run(mlflow_server), network(), images(2), registered_name=name)
    assert other.version == "2"
    assert log_model(client, new_run(mlflow_server), network(), images(2)).version is None


def test_a_model_that_cannot_be_exported_is_logged_as_a_pickle(
    mlflow_server: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "moody.py").write_text(MOODY)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("moody").Moody()
    client, run_id = server.connect(mlflow_server), new_run(mlflow_server)
    with caplog.at_level(logging.WARNING, "sweeper"):
        logged = log_model(client, run_id, module, images(2))
    assert logged.format == "pickle"
    assert any("cannot be exported" in message for message in caplog.messages)
    x = images(3)
    [found] = answers([(mlflow_server, logged.uri)], -x, tmp_path, pickle=True)
    np.testing.assert_array_equal(found, x.reshape(3, -1))


def test_a_failure_leaves_no_model_that_looks_ready(
    mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run_id = server.connect(mlflow_server), new_run(mlflow_server)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of disk")

    monkeypatch.setattr("mlflow.pytorch.save_model", broken)
    with pytest.raises(RuntimeError, match="out of disk"):
        log_model(client, run_id, network(), images(2))
    experiment = server.get_run(client, run_id).info.experiment_id
    [model] = client.search_logged_models([experiment])
    assert model.status == "FAILED"
    monkeypatch.undo()
    assert log_model(client, run_id, network(), images(2)).format == "pt2"

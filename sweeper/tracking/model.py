"""Log a trained model so that MLflow can load, serve and register it.

The format is ``pt2`` (``torch.export``): a graph and its weights, which loads without sweeper and
without executing pickled code. A model that cannot be exported is stored as MLflow's default, a
pickle of the module, and a warning says so. The pieces of ``mlflow.pytorch.log_model`` are called
one by one, because that function writes to MLflow's global run and address.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sweeper.errors import TrackerRefusedError
from sweeper.tracking.mlflow import translated

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from numpy.typing import NDArray
    from torch import nn

_log = logging.getLogger(__name__)
_NAME: Final = "model"
_FORMAT_TAG: Final = "sweeper.format"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedModel:
    """``uri`` is what ``mlflow.pytorch.load_model`` and ``mlflow.pyfunc.load_model`` take.

    ``version`` is its number under the registered name, or None where none was asked for or the
    server keeps no registry. ``format``: ``pt2`` or ``pickle``.
    """

    model_id: str
    uri: str
    version: str | None
    format: str


def log_model(
    client: MlflowClient,
    run_id: str,
    module: nn.Module,
    example: NDArray[np.float32],
    *,
    registered_name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> LoggedModel:
    """Log ``module`` with the run, with signature and input example, and register it.

    A run has one model: if it has one already, that is registered and returned.

    ``example`` is a batch of inputs as the module takes them (two or more, or the exported batch
    dimension is fixed at one). The module itself is not changed: a copy goes to the CPU and into
    evaluation mode. Raises TrackerUnreachableError, or TrackerRefusedError.
    """
    import torch
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, infer_signature

    with translated(f"read the run {run_id}"):
        run = client.get_run(run_id)
    for output in run.outputs.model_outputs if run.outputs else ():
        with translated(f"read the model {output.model_id}"):
            known = client.get_logged_model(output.model_id)
        if known.status == "READY":
            return _described(client, known, registered_name)

    ready = copy.deepcopy(module).to("cpu", torch.float32).eval()
    with torch.inference_mode():
        predicted = ready(torch.from_numpy(example)).numpy()
    with translated(f"log a model with the run {run_id}"):
        logged = client.create_logged_model(
            run.info.experiment_id, name=_NAME, source_run_id=run_id, params=dict(run.data.params)
        )
    try:
        with translated(f"log a model with the run {run_id}"):
            card = Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                signature=infer_signature(example, predicted),
                metadata=dict(metadata or {}) or None,
            )
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / _NAME
                used = _save(ready, example, card, path)
                client.log_model_artifacts(logged.model_id, str(path))
            client.set_logged_model_tags(logged.model_id, {_FORMAT_TAG: used})
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
            logged = client.finalize_logged_model(logged.model_id, "READY")
    except BaseException:
        with suppress(Exception):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    return _described(client, client.get_logged_model(logged.model_id), registered_name)


def _described(client: MlflowClient, logged: Any, registered_name: str | None) -> LoggedModel:
    version = None
    if registered_name is not None:
        version = _version(client, logged, registered_name)
    return LoggedModel(
        model_id=logged.model_id,
        uri=f"models:/{logged.model_id}",
        version=version,
        format=logged.tags.get(_FORMAT_TAG, "pickle"),
    )


def _save(module: nn.Module, example: NDArray[np.float32], card: Any, path: Path) -> str:
    """Write the model's folder; which format it has become."""
    try:
        _save_as("pt2", module, example, card, path)
    except Exception as error:  # noqa: BLE001 - torch.export fails in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _log.warning("the model cannot be exported and is logged as a pickle: %s", reason)
    else:
        return "pt2"
    _save_as("pickle", module, example, card, path)
    return "pickle"


def _save_as(
    format_: str, module: nn.Module, example: NDArray[np.float32], card: Any, path: Path
) -> None:
    import mlflow
    import mlflow.pytorch
    import torch

    shutil.rmtree(path, ignore_errors=True)  # what a failed export left
    with _quiet():
        mlflow.pytorch.save_model(
            module,
            str(path),
            mlflow_model=card,
            input_example=example,
            signature=card.signature,
            # Named, because MLflow would otherwise load the model in a new process to find out.
            pip_requirements=[
                f"torch=={torch.__version__.split('+')[0]}",
                f"mlflow=={mlflow.__version__}",
                "numpy",
            ],
            serialization_format=format_,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of exporter and saver, which are not for whoever sweeps, to themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _version(client: MlflowClient, logged: Any, name: str) -> str | None:
    """The version that this model is of the registered ``name``; it becomes one if it is none.

    None where the server has no registry.
    """
    from mlflow.exceptions import MlflowException

    source = f"models:/{logged.model_id}"
    try:
        with translated(f"register the model {name!r}"):
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code not in {"RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"}:
                    raise
            known = client.search_model_versions(f"run_id = '{logged.source_run_id}'")
            for version in known:
                if version.name == name:
                    return str(version.version)
            version = client.create_model_version(
                name, source, run_id=logged.source_run_id, model_id=logged.model_id
            )
    except TrackerRefusedError as error:
        _log.warning("the model is logged but not registered: %s", error)
        return None
    return str(version.version)

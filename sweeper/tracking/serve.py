"""The process of the embedded MLflow server; started by `sweeper.tracking.server`.

MLflow's own application runs in this one process. ``mlflow server`` would start a supervisor and
workers besides: twice the time to start, three times the memory, and the workers outlive a
killed supervisor. This process ends when its parent is gone, however that ended.

Measured on 2 cores with mlflow 3.17.2: ready in 2.1 s (2.8 s on a new database) and 250 MB,
against 4.5 s (6.9 s) and 780 MB for ``mlflow server --workers 2`` at the same 5.5 ms a call.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import warnings
from typing import Any, Final

from sweeper.errors import SweeperError, TrackerUnreachableError
from sweeper.private import private_folder
from sweeper.settings import Settings, masked
from sweeper.tracking.database import create_file, created, is_current, make_whole

_WATCH_S: Final = 0.5
_GRACE_S: Final = 5.0


def main() -> None:
    """Serve what the environment's settings name on the socket that was handed over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    threading.Thread(target=_end_with, args=(arguments.parent,), daemon=True).start()
    try:
        _serve(Settings.resolve(), socket.socket(fileno=arguments.socket))
    except SweeperError as error:
        sys.exit(f"sweeper: {error}")  # into the log, whose end the launch shows


def _end_with(parent: int) -> None:
    """End this process once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


def _serve(settings: Settings, listener: socket.socket) -> None:
    os.environ.update(
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        MLFLOW_DISABLE_TELEMETRY="true",
        MLFLOW_ENABLE_AI_GATEWAY="false",
        # The pool's default of 5 connections overflows as HTTP 400, which no client repeats.
        # As many as there are threads; a PostgreSQL server gets back what is not in use.
        MLFLOW_SQLALCHEMYSTORE_POOL_SIZE="4" if settings.on_postgres else "40",
        MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW="40",
        MLFLOW_LOGGING_LEVEL="WARNING",
    )
    warnings.simplefilter("ignore")  # of MLflow's own imports; nobody reads them here
    import uvicorn

    os.umask(0o077)  # all that this process creates is the home folder's
    private_folder(settings.artifacts)
    address, root = settings.embedded_tracking_uri, settings.artifacts.as_uri()
    if settings.on_postgres:
        turn: contextlib.AbstractContextManager[None] = created(settings.store_url, address)
    else:
        create_file(settings.home / "mlflow.db", root)
        turn = contextlib.nullcontext()

    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR

    os.environ[BACKEND_STORE_URI_ENV_VAR] = address
    os.environ[ARTIFACT_ROOT_ENV_VAR] = root

    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    with turn:
        if not is_current(address):
            raise TrackerUnreachableError(
                f"an older MLflow wrote the database {masked(address)}; back it up, then run: "
                f"mlflow db upgrade '{masked(address)}'"
            )
        initialize_backend_stores(address, address, root)
    server = uvicorn.Server(
        uvicorn.Config(
            _without_assistant(app),
            log_level="warning",
            access_log=False,
            timeout_keep_alive=120,
            timeout_graceful_shutdown=3,
        )
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it once more at its end
    failed = 0
    try:
        server.run(sockets=[listener])
    except SystemExit as asked:
        failed = int(bool(asked.code))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not settings.on_postgres:
        make_whole(settings.home / "mlflow.db")
    os._exit(failed)  # Python would take seconds to tidy up


def _without_assistant(app: Any) -> Any:
    """``app`` without MLflow's assistant.

    It runs shell commands for whoever reaches the port, and on a shared machine that is everybody
    who has an account there. MLflow has no switch for it.
    """

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if "/mlflow/assistant" in scope.get("path", ""):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await app(scope, receive, send)

    return guarded


if __name__ == "__main__":
    main()

"""The tracker as a whole sweep needs it: a server that is there, and what is left is sent."""

from __future__ import annotations

import threading
import time
from typing import Final, Self

from sweeper.errors import TrackerUnreachableError
from sweeper.settings import Owner, Settings
from sweeper.tracking.database import bring_up_to_date, is_there
from sweeper.tracking.server import LocalServer, running_address
from sweeper.tracking.spool import Address, Replayed, SpoolTracker, replay

_EVERY_S: Final = 5.0
_LOOK_S: Final = 0.2


def address(settings: Settings) -> Address:
    """Where this process finds the server: the one that is set, or the home folder's."""
    return settings.tracking_uri or (lambda: running_address(settings))


def tracker(settings: Settings, writer: str | None = None) -> SpoolTracker:
    """A tracker of this process, which spools into the home folder."""
    return SpoolTracker(settings.spool, address(settings), writer=writer)


class TrackingService:
    """Keeps the embedded server running where no other is set; starting it does not block.

    >>> with TrackingService(settings) as service:  # doctest: +SKIP
    ...     service.wait()
    ...     service.replay()
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server = None if settings.tracking_uri else LocalServer(settings)
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._looked = 0.0

    def __enter__(self) -> Self:
        self.look_after()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._server is None:
            return
        while self._thread is not None and self._thread.is_alive():
            self._server.stop()  # who waits for it to start need not wait any longer
            self._thread.join(_LOOK_S)
        self._server.stop()

    @property
    def uri(self) -> str | None:
        """The server's address; None while the embedded one is not up."""
        return self._settings.tracking_uri or running_address(self._settings)

    def look_after(self) -> str:
        """Start the embedded server, again if it died; what stands in the way, if anything does.

        Returns at once: the work is done in a thread.
        """
        busy = self._thread is not None and self._thread.is_alive()
        if self._server is not None and not busy and time.monotonic() - self._looked > _EVERY_S:
            self._looked = time.monotonic()
            self._thread = threading.Thread(
                target=self._ensure, args=(self._server,), name="mlflow", daemon=True
            )
            self._thread.start()
        return self._problem

    def _ensure(self, server: LocalServer) -> None:
        try:
            server.ensure()
            self._problem = ""
        except (TrackerUnreachableError, OSError) as error:  # a folder that takes no files
            self._problem = str(error)

    def wait(self) -> str:
        """The server's address, once it answers. Raises TrackerUnreachableError if it does not."""
        if self._thread is not None:
            self._thread.join()
        if self._server is not None:
            return self._server.ensure()
        return str(self._settings.tracking_uri)

    def replay(self, *, refused_too: bool = False) -> Replayed:
        """Send what dead processes left in the spool, and what MLflow refused if that is wanted."""
        return replay(self._settings.spool, self.wait(), refused_too=refused_too)

    def experiment_id(self, study: str) -> str | None:
        """The id of a study's experiment, or None where the server cannot tell."""
        from sweeper.tracking import mlflow

        try:
            return mlflow.experiment_id(mlflow.connect(self.wait()), study)
        except TrackerUnreachableError:
            return None


def readable_uri(settings: Settings) -> str | None:
    """Where a study's runs can be read: the server, or the embedded database without one.

    None where nothing was ever tracked. Raises TrackerUnreachableError.
    """
    uri = settings.tracking_uri or running_address(settings)
    if uri is not None:
        return uri
    if settings.on_postgres:
        there = is_there(settings.store_url, settings.embedded_tracking_uri)
    elif there := (settings.home / "mlflow.db").exists():
        bring_up_to_date(settings.home / "mlflow.db")
    return settings.embedded_tracking_uri if there else None


def find_run_ids(settings: Settings, study: str, owner: Owner) -> dict[str, str]:
    """Key to run id of the owner's runs of a study; nothing where the tracker cannot be reached."""
    from sweeper.tracking import mlflow

    try:
        uri = readable_uri(settings)
        return {} if uri is None else mlflow.run_ids(mlflow.connect(uri), study, owner)
    except TrackerUnreachableError:
        return {}

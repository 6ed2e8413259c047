"""Where measurements go: a local journal first, an MLflow server in the background.

:class:`Tracker` is what trials talk to; :class:`SpoolTracker` is the real one, :func:`replay`
sends what processes left that are gone, :class:`LocalServer` is the server where none is named.
MLflow itself is loaded only once something is sent, and only in `sweeper.tracking.mlflow`,
`sweeper.tracking.model` and the server's process.
"""

from sweeper.tracking.memory import MemoryTracker
from sweeper.tracking.protocol import RunStart, Tracker
from sweeper.tracking.server import LocalServer, running_address
from sweeper.tracking.service import TrackingService, find_run_ids, tracker
from sweeper.tracking.spool import Replayed, SpoolTracker, replay

__all__ = [
    "LocalServer",
    "MemoryTracker",
    "Replayed",
    "RunStart",
    "SpoolTracker",
    "Tracker",
    "TrackingService",
    "find_run_ids",
    "replay",
    "running_address",
    "tracker",
]

"""The store: an Optuna study in one SQL database, used as a queue.

``database`` opens it, ``studies`` creates and finds studies, ``tickets`` plans and enqueues trials,
``queue`` hands them out and takes them back, ``recovery`` finds the lost and retries, ``sampling``
draws points, ``view`` shows how a study stands, ``overview`` how all do, ``workers`` who works on
them. ``remote`` and ``proxy`` are the two ends of ``grpc://``. Optuna is imported here and in
``report`` only.
"""

from sweeper.store.attributes import Control, Outcome
from sweeper.store.database import Store, open_store
from sweeper.store.queue import Claim
from sweeper.store.studies import StoredStudy
from sweeper.store.view import Standing, TrialRow, standing

__all__ = [
    "Claim",
    "Control",
    "Outcome",
    "Standing",
    "Store",
    "StoredStudy",
    "TrialRow",
    "open_store",
    "standing",
]

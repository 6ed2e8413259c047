"""The store: an Optuna study in one SQL database, used as a queue.

``database`` opens it, ``studies`` creates and finds studies, ``tickets`` plans and enqueues trials,
``queue`` hands them out and takes them back, ``held`` is what a worker does with one, ``recovery``
finds the lost and retries, ``sampling`` draws points (``samplers`` adapts two of Optuna's),
``glance`` counts how a study stands, ``enough`` tells whether that will do, ``view`` lists its
trials, ``overview`` counts all studies, ``workers`` tells who works on them. ``tables`` and
``cache`` read and write Optuna's tables in bulk. ``remote`` and ``proxy`` are the two ends of
``grpc://``. Optuna is imported here and in ``report`` only.
"""

from sweeper.store.attributes import Control, Outcome
from sweeper.store.database import Store, open_store
from sweeper.store.glance import Progress, progress
from sweeper.store.queue import Claim
from sweeper.store.studies import StoredStudy
from sweeper.store.view import Standing, TrialRow, standing

__all__ = [
    "Claim",
    "Control",
    "Outcome",
    "Progress",
    "Standing",
    "Store",
    "StoredStudy",
    "TrialRow",
    "open_store",
    "progress",
    "standing",
]

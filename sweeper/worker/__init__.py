"""A worker: claim a trial, train it, report every epoch, finish it; then the next.

``loop`` claims, ``attempt`` takes one trial to its end, ``cohorts`` says which trials may train
together, ``room`` how many more, and ``together`` trains them. ``heart`` beats for them,
``reports`` tells the store of their epochs, ``signals`` and ``patience`` are about ending early and
holding out.
"""

from sweeper.worker.loop import Worker, run_ids_into
from sweeper.worker.patience import patiently
from sweeper.worker.signals import Signals, StopNowError
from sweeper.worker.tracked import flattened

__all__ = ["Signals", "StopNowError", "Worker", "flattened", "patiently", "run_ids_into"]

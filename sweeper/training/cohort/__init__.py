"""Cohorts: several trials of one structure that train as one batch (design decision 7).

``rules`` say which trials fit together, ``members`` are what a worker sees, ``engine`` trains them,
with the update rules of ``optimizer``, the random streams of ``noise``, the ``losses`` and the
matrices of ``state``. ``sizing`` measures how many at once are the fastest.
"""

from sweeper.training.cohort.members import Cohort, Member
from sweeper.training.cohort.rules import structure, why_alone
from sweeper.training.cohort.sizing import best_size

__all__ = ["Cohort", "Member", "best_size", "structure", "why_alone"]

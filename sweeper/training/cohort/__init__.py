"""Cohorts: several trials of one structure that train as one batch (design decision 7).

``rules`` say which trials fit together, ``members`` are what a worker sees, ``engine`` trains them,
with the update rules of ``optimizer``, the random streams of ``noise``, the ``losses`` and the
matrices of ``state``.
"""

from sweeper.training.cohort.members import Cohort, Member
from sweeper.training.cohort.rules import structure, why_alone

__all__ = ["Cohort", "Member", "structure", "why_alone"]

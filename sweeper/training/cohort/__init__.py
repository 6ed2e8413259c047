"""Cohorts: several trials of one structure that train as one batch (design decision 7).

``rules`` say which trials fit together, ``members`` are what a worker sees, ``engine`` trains them
by a step that ``ready`` captures and compiles, with the random streams of ``noise`` and the
``losses``, on models that are the rows of one matrix (`sweeper.training.rows`). ``sizing`` measures
how many at once are the fastest, as a cohort or side by side (`sweeper.training.crew`); ``choice``
remembers.
"""

from sweeper.training.cohort.choice import Choice, known_way
from sweeper.training.cohort.members import Cohort, Member
from sweeper.training.cohort.rules import Way, structure, why_alone, why_not_beside
from sweeper.training.cohort.sizing import best_way

__all__ = [
    "Choice",
    "Cohort",
    "Member",
    "Way",
    "best_way",
    "known_way",
    "structure",
    "why_alone",
    "why_not_beside",
]

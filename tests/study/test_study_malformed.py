"""The short form of ``scripts/malformed``: spoilt study files through the real command line."""

from __future__ import annotations

import itertools
from pathlib import Path

from study.malformed import examine, spoilt


def test_malformed_files_are_refused_with_the_place_of_every_mistake(tmp_path: Path) -> None:
    account = examine(tmp_path, count=100, seed=1)
    assert account.wrong == [], account.table()
    assert account.malformed >= 100
    assert account.valid < account.malformed  # the mutations do spoil files
    assert len(account.messages) > 25, account.table()


def test_a_seed_spoils_files_in_the_same_way_again() -> None:
    first, again = (list(itertools.islice(spoilt(7), 20)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 20

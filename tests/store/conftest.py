"""Stores to test against: SQLite always, PostgreSQL from the pgserver wheel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sweeper.store import Store, StoredStudy, open_store, studies, tickets
from sweeper.study.spec import StudySpec

SPEC = {
    "name": "study",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "search": {"trials": 4},
    "parameters": {"optimizer.lr": {"low": 1.0e-4, "high": 0.1, "log": True}},
}


@pytest.fixture
def spec() -> Callable[..., StudySpec]:
    """A small study; keyword arguments replace top-level sections."""

    def make(**sections: object) -> StudySpec:
        return StudySpec.model_validate({**SPEC, **sections})

    return make


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'it is a store.db'}"
    new_database: Callable[[], str] = request.getfixturevalue("postgres_database")
    return new_database()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """An open, empty store."""
    opened = open_store(url)
    yield opened
    opened.close()


@pytest.fixture
def started(store: Store, spec: Callable[..., StudySpec]) -> Callable[..., StoredStudy]:
    """Create a study with all its trials enqueued."""

    def start(**sections: object) -> StoredStudy:
        wanted = spec(**sections)
        with store.exclusively():
            study = studies.create(store, wanted)
            if study is None:
                raise ValueError("the study is there already")
            tickets.fill(store, study.id, wanted, tickets.tickets(wanted, with_reference=True))
        return study

    return start

"""Opening stores, and refusing what cannot be one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from sweeper.errors import StoreUnreachableError, StudyNotFoundError, UsageError
from sweeper.store import Control, Store, StoredStudy, open_store, studies
from sweeper.study.spec import StudySpec


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("nonsense", "must be a URL"),
        ("mysql://host/db", "must be SQLite or PostgreSQL"),
        ("sqlite://", "in-memory"),
        ("sqlite:///:memory:", "in-memory"),
    ],
)
def test_what_cannot_be_a_store_is_refused(url: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        open_store(url)


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(StoreUnreachableError) as caught:
        open_store("postgresql://me:geheim@127.0.0.1:1/sweeps")
    assert "geheim" not in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    file.write_text("this is not a database, but it is long enough to look like a file" * 100)
    with pytest.raises(StoreUnreachableError, match="store\\.db"):
        open_store(f"sqlite:///{file}")


def _open(url: str, done: multiprocessing.Queue[str]) -> None:
    try:
        open_store(url)
        done.put("open")
    except Exception as error:  # noqa: BLE001 - the test reads what it was
        done.put(repr(error))


def test_ten_processes_open_an_empty_store_at_once(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    done: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_open, args=(url, done)) for _ in range(10)]
    for process in processes:
        process.start()
    assert [done.get(timeout=120) for _ in processes] == ["open"] * 10
    for process in processes:
        process.join()


def test_an_unknown_study_is_named_with_the_nearest(
    store: Store, started: Callable[..., StoredStudy]
) -> None:
    started(name="mixer_cifar")
    with pytest.raises(StudyNotFoundError, match="did you mean 'mixer_cifar'"):
        studies.load(store, "mixer_cifr")


def test_a_study_comes_back_as_it_was_stored(
    store: Store, started: Callable[..., StoredStudy]
) -> None:
    study = started(train={"epochs": 3}, objective="val_loss")
    again = studies.load(store, study.name)
    assert again.spec == study.spec
    assert studies.names(store) == ["study"]
    assert studies.control(store, again.id) is Control.RUN
    studies.ask(store, again.id, Control.PAUSE)
    assert studies.control(store, again.id) is Control.PAUSE


def test_a_study_of_somebody_else_is_refused(store: Store) -> None:
    import optuna

    optuna.create_study(study_name="theirs", storage=store.storage)
    with pytest.raises(UsageError, match="something other than sweeper"):
        studies.load(store, "theirs")


def test_a_half_created_study_is_completed(store: Store, spec: Callable[..., StudySpec]) -> None:
    import optuna

    from sweeper.store import attributes as attr

    half = optuna.create_study(study_name="study", storage=store.storage)
    half.set_user_attr(attr.CREATED, 0.0)
    assert studies.create(store, spec()) is not None
    assert studies.create(store, spec()) is None


@pytest.mark.postgres
def test_a_server_drops_who_was_cut_off_unless_the_url_says_otherwise(
    postgres_database: Callable[[], str],
) -> None:
    """A worker whose machine lost its network must not keep locks for hours."""
    url = make_url(postgres_database())
    for given, expected in ((), "2min"), (("-c idle_in_transaction_session_timeout=7s",), "7s"):
        opened = open_store(
            url.update_query_pairs([("options", word) for word in given]).render_as_string(
                hide_password=False
            )
        )
        with opened.backend.engine.connect() as connection:
            found = connection.execute(text("SHOW idle_in_transaction_session_timeout"))
            assert found.scalar_one() == expected
        opened.close()
        assert "keepalives" not in str(opened.url), "messages show what a person wrote"

"""The names that follow from a store's URL."""

from __future__ import annotations

import pytest
from sqlalchemy.engine import make_url

from sweeper.address import host_of, store_address
from sweeper.settings import group_name


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("postgresql://db.example.org:5433/s", "db.example.org"),
        ("postgresql:///s?host=db.example.org", "db.example.org"),
        ("postgresql:///s?host=one:5432&host=two:5432", "one:5432,two:5432"),
        ("postgresql:///s?host=/run/postgresql", "/run/postgresql"),
        ("postgresql:///s", None),
        ("sqlite:////s.db", None),
    ],
)
def test_the_host_may_be_a_parameter(url: str, host: str | None) -> None:
    assert host_of(make_url(url)) == host


def test_psycopg_serves_where_no_driver_is_named() -> None:
    assert store_address("postgresql://h/s").drivername == "postgresql+psycopg"
    assert store_address("postgresql+psycopg2://h/s").drivername == "postgresql+psycopg2"
    assert store_address("sqlite:////s.db").drivername == "sqlite"


def test_no_two_stores_share_a_group_and_a_new_password_keeps_it() -> None:
    urls = [
        "postgresql://me@one/s",
        "postgresql://me@two/s",
        "postgresql://me@one:5433/s",
        "postgresql://me@one/other",
        "postgresql://me@/s",
        "postgresql://me@/s?host=/run/one",
        "postgresql://me@/s?host=/run/two",
        "sqlite:////one/s",
    ]
    names = [group_name(url, "study") for url in urls]
    assert len(set(names)) == len(urls)
    assert all(name.startswith("study-") for name in names)
    assert group_name("postgresql://me:secret@one/s", "study") == names[0]
    assert group_name("postgresql+psycopg://you@one/s?sslmode=require", "study") == names[0]

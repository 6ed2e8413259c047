"""``/healthz``, ``/livez``, ``/metrics``, asked over HTTP and read by Prometheus's own parser."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sweeper.errors import UsageError
from sweeper.service import board as boards
from sweeper.service.board import Board, Snapshot
from sweeper.service.endpoint import Endpoint
from sweeper.store import Control
from sweeper.store.overview import Tally
from sweeper.store.workers import Presence, WorkerRow

COUNTS = {"complete": 3, "pruned": 1, "failed": 0, "running": 2, "waiting": 4, "retried": 5}


def tally(name: str, control: Control = Control.RUN) -> Tally:
    return Tally(study_id=1, name=name, counts=COUNTS, control=control, finished=None)


def worker(name: str, silent_s: float, **known: object) -> WorkerRow:
    presence = Presence(name=name, host="h", pid=1, device="cpu", launcher="ray", **known)  # type: ignore[arg-type]  # by the caller
    return WorkerRow(presence=presence, silent_s=silent_s, age_s=99)


SNAPSHOT = Snapshot(
    tallies=(tally('it\'s "a" study'), tally("paused", Control.PAUSE)),
    workers=(
        worker("busy", 1, study="a", trials=(3,), samples_per_s=100.0),
        worker("idle", 2),
        worker("gone", 900, study="a", trials=(4,), samples_per_s=50.0),
    ),
    spool_bytes=123,
    spool_files=1,
)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def endpoint(board: Board) -> Iterator[Endpoint]:
    with Endpoint(board, "127.0.0.1", 0) as served:
        yield served


def get(endpoint: Endpoint, path: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(endpoint.address + path, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_follows_the_store(
    board: Board, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = get(endpoint, "/healthz")
    assert (status, said) == (503, "the store has not answered yet\n")
    board.show(SNAPSHOT)
    assert get(endpoint, "/healthz") == (200, "ok\n")
    board.complain("postgresql://me:geheim@host said: refused")
    assert get(endpoint, "/healthz")[0] == 200  # a moment's silence is no outage
    monkeypatch.setattr(boards, "ANSWER_S", 0.0)
    status, said = get(endpoint, "/healthz")
    assert status == 503
    assert "refused" in said
    assert "geheim" not in said


def test_a_controller_lives_while_its_loop_turns_whatever_the_store_does(
    board: Board, endpoint: Endpoint
) -> None:
    board.complain("refused")
    assert get(endpoint, "/healthz")[0] == 503
    assert get(endpoint, "/livez") == (200, "ok\n")
    board._turned -= boards.TURN_S
    status, said = get(endpoint, "/livez")
    assert (status, said.startswith("the controller has been stuck for 30")) == (503, True)
    board.turn()
    assert get(endpoint, "/livez") == (200, "ok\n")


def test_metrics_are_what_the_board_shows(board: Board, endpoint: Endpoint) -> None:
    board.show(SNAPSHOT)
    status, text = get(endpoint, "/metrics")
    assert status == 200
    found = {
        (sample.name, *map(sample.labels.get, sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for state, count in COUNTS.items():
        assert found["sweeper_trials", state, 'it\'s "a" study'] == count
    assert found["sweeper_budget_trials", "paused"] == 10
    assert found[("sweeper_queue_length",)] == 4  # nobody takes trials of a paused study
    assert found["sweeper_workers", "ray"] == 2
    assert found[("sweeper_workers_busy",)] == 1
    assert found[("sweeper_samples_per_second",)] == 100
    assert found[("sweeper_spool_bytes",)] == 123
    assert found[("sweeper_store_up",)] == 1
    assert get(endpoint, "/else")[0] == 404


def test_a_port_that_is_taken_is_said(board: Board, endpoint: Endpoint) -> None:
    with pytest.raises(UsageError, match="--port"):
        Endpoint(board, "127.0.0.1", endpoint.port).__enter__()

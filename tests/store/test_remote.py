"""Workers behind a controller's gRPC proxy: the same claims, heartbeats and losses."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text

from sweeper.errors import StoreUnreachableError, TrialLostError, UsageError
from sweeper.store import (
    Outcome,
    Store,
    StoredStudy,
    held,
    open_store,
    overview,
    queue,
    recovery,
    standing,
    studies,
    workers,
)
from sweeper.store.workers import Presence

pytest.importorskip("grpc", reason="the extra grpc is not installed")

Start = Callable[..., StoredStudy]


@pytest.fixture
def proxy(url: str, store: Store) -> Iterator[str]:
    """The address of a proxy for the store; the store itself is open beside it."""
    from sweeper.store.proxy import ProxyServer

    with ProxyServer(url, "127.0.0.1", 0) as server:
        yield f"grpc://127.0.0.1:{server.port}"


@pytest.fixture
def remote(proxy: str) -> Iterator[Store]:
    opened = open_store(proxy)
    yield opened
    opened.close()


def silence(store: Store) -> None:
    """Let every heartbeat be minutes ago."""
    ago = (
        "datetime(heartbeat, '-300 seconds')"
        if store.url.get_backend_name() == "sqlite"
        else "heartbeat - interval '300 seconds'"
    )
    with store.backend.engine.begin() as connection:
        connection.execute(text(f"UPDATE trial_heartbeats SET heartbeat = {ago}"))


def test_a_trial_goes_through_the_proxy_from_claim_to_end(
    store: Store, remote: Store, started: Start
) -> None:
    study = started(search={"trials": 2})
    assert overview.queued(remote) == [study.id]
    seen = studies.load(remote, "study")
    assert seen.spec == study.spec
    claimed = queue.claim(remote, seen.id, "far")
    assert claimed is not None
    values = held.values_of(seen.spec, seen.study, claimed)
    assert 1.0e-4 <= values["optimizer.lr"] <= 0.1
    held.report(remote, claimed, 1, 0.25)
    held.report_missing(remote, claimed, {1: 9.0, 2: 0.5})
    assert not held.should_prune(remote, seen.study, claimed, 2, {1: 0.25, 2: 0.5})
    for _ in range(2):  # the answer to the first may have been lost on the way
        held.finish(remote, seen.study, claimed, outcome=Outcome.COMPLETED, values=[0.5])
    row = standing(store, study).rows[0]
    assert (row.state, row.worker, row.values) == ("complete", "far", (0.5,))
    assert (dict(row.history), dict(row.params)) == ({1: 0.25, 2: 0.5}, values)
    second = queue.claim(remote, seen.id, "far")
    assert second is not None
    held.put_back(remote, second)
    assert standing(store, study).counts["waiting"] == 1


def test_heartbeats_keep_a_trial_and_their_absence_loses_it(
    store: Store, remote: Store, started: Start
) -> None:
    study = started(search={"trials": 1})
    claimed = queue.claim(remote, study.id, "far")
    assert claimed is not None
    silence(store)
    held.beat(remote, [claimed])
    assert recovery.reap(store, study.id, lost_after_s=60) == []
    silence(store)
    assert recovery.reap(store, study.id, lost_after_s=60) == [0]
    with store.exclusively():
        assert len(recovery.reconcile(store, study.id, study.spec)) == 1
    far = studies.load(remote, "study").study
    with pytest.raises(TrialLostError):
        held.report(remote, claimed, 1, 0.5)
    with pytest.raises(TrialLostError):
        held.finish(remote, far, claimed, outcome=Outcome.COMPLETED, values=[0.5])
    again = queue.claim(remote, study.id, "heir")
    assert again is not None
    assert (again.number, again.origin, again.attempt) == (1, 0, 2)


def test_those_that_come_to_a_rung_together_see_each_other_there(
    store: Store, remote: Store, started: Start
) -> None:
    pruner = {"name": "asha", "min_epochs": 1, "reduction": 2}
    study = started(search={"trials": 4, "pruner": pruner})
    far = studies.load(remote, "study").study
    claims = [queue.claim(remote, study.id, "far") for _ in range(4)]
    pruned = []
    for claimed, value in zip(claims, (0.9, 0.8, 0.7, 0.6), strict=True):
        assert claimed is not None
        held.report(remote, claimed, 1, value)
        pruned.append(held.should_prune(remote, far, claimed, 1, {1: value}))
    assert pruned == [False, True, True, True]
    first, *_, last = claims
    assert first is not None
    assert last is not None
    known = remote.storage.get_trial(last.trial_id)
    assert known.system_attrs["completed_rung_0"] == 0.6
    assert known.user_attrs["sweeper.pruned_after"] == 1
    assert recovery._lose(store, first.trial_id)
    with pytest.raises(TrialLostError):
        held.should_prune(remote, far, first, 2, {1: 0.9, 2: 0.9})
    assert "completed_rung_1" not in remote.storage.get_trial(first.trial_id).system_attrs


@pytest.mark.parametrize("at_once", [2, 1000])
def test_what_a_cohort_says_is_one_call(
    store: Store, remote: Store, started: Start, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    from sweeper.store.remote import RemoteStorage

    monkeypatch.setattr(held, "_SENT_AT_ONCE", at_once)
    study = started(search={"trials": 4})
    found = [queue.claim(remote, study.id, "far") for _ in range(4)]
    claims = [claimed for claimed in found if claimed is not None]
    lost = claims[1].trial_id
    assert recovery._lose(store, lost)
    silence(store)
    calls: list[str] = []
    call = RemoteStorage.call

    def counted(storage: RemoteStorage, what: str, /, **arguments: Any) -> Any:
        calls.append(what)
        return call(storage, what, **arguments)

    monkeypatch.setattr(RemoteStorage, "call", counted)
    series = {1: 0.5, 2: math.inf, 3: math.nan}
    reports = {claimed.trial_id: series for claimed in claims} | {-1: {1: 0.5}}
    assert held.report_all(remote, reports) == {-1, lost}
    held.beat(remote, claims)
    assert calls == ["report"] * (7 if at_once == 2 else 1) + ["beat"]
    assert recovery.reap(store, study.id, lost_after_s=60) == []
    for claimed in claims:
        stored = store.storage.get_trial(claimed.trial_id).intermediate_values
        assert repr(stored) == repr({} if claimed.trial_id == lost else series)
    with pytest.raises(ValueError, match="no number"):
        held.report_all(remote, {claims[0].trial_id: {4: "no number"}})  # type: ignore[dict-item]


def test_many_claim_at_once_and_no_trial_is_claimed_twice(
    store: Store, proxy: str, started: Start
) -> None:
    study = started(search={"trials": 40})
    taken: list[int] = []

    def work(name: str) -> None:
        opened = open_store(proxy)
        seen = studies.load(opened, "study")
        while (claimed := queue.claim(opened, seen.id, name)) is not None:
            held.finish(opened, seen.study, claimed, outcome=Outcome.COMPLETED, values=[0.5])
            taken.append(claimed.number)
        opened.close()

    threads = [threading.Thread(target=work, args=(f"w{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(taken) == list(range(40))
    assert Counter(row.state for row in standing(store, study).rows) == {"complete": 40}


def test_a_worker_behind_the_proxy_is_listed(store: Store, remote: Store) -> None:
    me = Presence(
        name="far",
        host="there",
        pid=1,
        device="cpu",
        launcher="slurm",
        study="study",
        trials=(1, 2),
    )
    workers.tell(remote, me)
    assert [row.presence for row in workers.listed(store)] == [me]
    workers.leave(remote, "far")
    assert workers.listed(store) == []


def test_what_needs_the_database_says_so(remote: Store, started: Start) -> None:
    started()
    with pytest.raises(UsageError, match="serves workers and nothing else"):
        workers.listed(remote)
    with pytest.raises(UsageError, match="database itself"), remote.exclusively():
        pass


def test_a_proxy_that_is_gone_is_a_store_out_of_reach(url: str, store: Store) -> None:
    from sweeper.store.proxy import ProxyServer

    with ProxyServer(url, "127.0.0.1", 0) as server:
        opened = open_store(f"grpc://127.0.0.1:{server.port}")
        with pytest.raises(UsageError, match="cannot be had"):
            ProxyServer(url, "127.0.0.1", server.port).__enter__()
    for call in (lambda: overview.queued(opened), lambda: studies.names(opened)):
        with pytest.raises(StoreUnreachableError, match=rf"grpc://127.0.0.1:{server.port} said"):
            call()
    opened.close()
    with pytest.raises(UsageError, match="grpc://host:port"):
        open_store("grpc://")

"""The reports of all trials of a worker: one transaction for many, and each one's own fate."""

from __future__ import annotations

import contextlib
import gc
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from servers.postgres import Postgres

from sweeper.errors import StoreRefusedError, StoreUnreachableError, TrialLostError
from sweeper.store import (
    Control,
    Store,
    StoredStudy,
    held,
    open_store,
    queue,
    recovery,
    studies,
    tickets,
    workers,
)
from sweeper.store.workers import Presence
from sweeper.study.spec import StudySpec
from sweeper.worker import Signals, reports
from sweeper.worker.heart import Heart
from sweeper.worker.reports import Reporter, Reports

STUDY: dict[str, Any] = {
    "name": "many",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "search": {"trials": 8, "sampler": "random"},
    "parameters": {"optimizer.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}},
}
BELOW_HALF = {"name": "threshold", "lower": 0.5, "min_epochs": 1}


class Company:
    """Attempts of one worker at trials of one study, and the one thread that reports for them."""

    def __init__(self, url: str, many: int, *, pruner: dict[str, Any] | None = None) -> None:
        search = {**STUDY["search"], **({"pruner": pruner} if pruner else {})}
        spec = StudySpec.model_validate({**STUDY, "search": search})
        self.store: Store = open_store(url)
        with self.store.exclusively():
            study = studies.create(self.store, spec)
            if study is None:
                raise ValueError("the study is there already")
            tickets.fill(self.store, study.id, spec, tickets.tickets(spec, with_reference=False))
        self.study: StoredStudy = study
        found = (queue.claim(self.store, study.id, "me") for _ in range(many))
        self.claims = [claimed for claimed in found if claimed is not None]
        self.reporter = Reporter(self.store)
        self.said = [self.reports(claimed) for claimed in self.claims]
        self.commits = 0
        sqlalchemy.event.listen(self.store.backend.engine, "commit", self._committed)

    def reports(self, claimed: queue.Claim) -> Reports:
        return Reports(self.reporter, self.study, claimed)

    def stored(self, index: int) -> dict[int, float]:
        frozen = self.store.backend.get_trial(self.claims[index].trial_id)
        return dict(frozen.intermediate_values)

    def close(self) -> None:
        self.reporter.close()
        self.store.close()

    def _committed(self, _connection: object) -> None:
        self.commits += 1


Assemble = Callable[..., Company]


@pytest.fixture
def assemble() -> Iterator[Assemble]:
    with ExitStack() as stack:
        yield lambda *args, **more: stack.enter_context(contextlib.closing(Company(*args, **more)))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/optuna.db"
    new_database: Callable[[], str] = request.getfixturevalue("postgres_database")
    return new_database()


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/optuna.db"


def test_what_all_say_of_an_epoch_is_one_transaction(url: str, assemble: Assemble) -> None:
    company = assemble(url, 5)
    for epoch in (1, 2):
        for index, said in enumerate(company.said):
            said.put(epoch, index + epoch / 10)
    assert [said.verdict() for said in company.said] == [False] * 5
    assert all(said.settle(60) for said in company.said)
    assert company.commits == 1
    for index in range(5):
        assert company.stored(index) == {1: index + 0.1, 2: index + 0.2}


def test_who_was_lost_hears_it_and_the_others_are_stored(url: str, assemble: Assemble) -> None:
    company = assemble(url, 3, pruner=BELOW_HALF)
    assert recovery._lose(company.store, company.claims[1].trial_id)
    for said in company.said:
        said.put(1, 0.75)
    assert not company.said[0].verdict()
    with pytest.raises(TrialLostError):
        company.said[1].verdict()
    assert [said.lost for said in company.said] == [False, True, False]
    assert not company.said[2].verdict()
    assert [company.stored(index) for index in range(3)] == [{1: 0.75}, {}, {1: 0.75}]
    with pytest.raises(TrialLostError):
        company.said[1].put(2, 0.75)


def test_one_of_many_that_is_no_more_is_lost(url: str, assemble: Assemble) -> None:
    company = assemble(url, 1)
    (claimed,) = company.claims
    there = {claimed.trial_id: {1: 0.5}}
    gone = {trial_id: {1: 0.5} for trial_id in range(-1200, 0)}
    assert held.report_all(company.store, {**gone, **there}) == set(gone)
    assert company.stored(0) == {1: 0.5}


def test_a_pruner_answers_several_at_once(url: str, assemble: Assemble) -> None:
    company = assemble(url, 4, pruner=BELOW_HALF)
    for said, value in zip(company.said, (0.75, 0.25, 0.25, 1.0), strict=True):
        said.put(1, value, decide=said is not company.said[2])
    assert [said.verdict() for said in company.said[:2]] == [False, True]
    assert company.commits == 1
    assert [said.verdict() for said in company.said[2:]] == [False, False]


def test_a_pruner_is_asked_about_the_newest_report_only(url: str, assemble: Assemble) -> None:
    company = assemble(url, 2, pruner=BELOW_HALF)
    asked: list[tuple[int, int]] = []
    should_prune = held.should_prune

    def ask(store: Any, study: Any, claimed: queue.Claim, epoch: int, told: Any) -> bool:
        asked.append((claimed.number, epoch))
        return should_prune(store, study, claimed, epoch, told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "should_prune", ask)
        for epoch, value in ((1, 0.25), (2, 0.75)):
            for said in company.said:
                said.put(epoch, value)
        assert [said.verdict() for said in company.said] == [False, False]
    assert asked == [(0, 2), (1, 2)]


def test_those_that_come_to_a_rung_together_see_each_other_there(
    url: str, assemble: Assemble
) -> None:
    """The best is asked about first, so that nobody after it is among the better half."""
    company = assemble(url, 8, pruner={"name": "asha", "min_epochs": 1, "reduction": 2})
    for value, said in enumerate(reversed(company.said)):
        said.put(1, value)
    assert [said.verdict() for said in company.said] == [False] + [True] * 7


def test_a_decision_that_could_not_be_stored_is_made_again(url: str, assemble: Assemble) -> None:
    company = assemble(url, 2, pruner={"name": "asha", "min_epochs": 1, "reduction": 2})
    good, bad = company.said
    failed: list[str] = []

    def fail(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "sweeper.pruned_after" in str(parameters) and not failed:
            failed.append(statement)
            raise sqlalchemy.exc.OperationalError(statement, {}, Exception("gone"))

    assert not good.tell(1, 0.9)
    sqlalchemy.event.listen(company.store.backend.engine, "before_cursor_execute", fail)
    assert not bad.tell(1, 0.1)  # the store is away
    assert bad.settle(60)
    assert bad.verdict()
    assert failed
    attributes = [
        company.store.storage.get_trial(claimed.trial_id).system_attrs for claimed in company.claims
    ]
    assert [each["completed_rung_0"] for each in attributes] == [0.9, 0.1]


def test_a_pruner_that_raises_ends_its_own_attempt(file_url: str, assemble: Assemble) -> None:
    company = assemble(file_url, 3, pruner=BELOW_HALF)
    should_prune = held.should_prune

    def ask(store: Any, study: Any, claimed: queue.Claim, epoch: int, told: Any) -> bool:
        if claimed.number == 1:
            raise ZeroDivisionError("a pruner's own mistake")
        return should_prune(store, study, claimed, epoch, told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "should_prune", ask)
        for said in company.said:
            said.put(1, 0.25)
        assert company.said[0].verdict()
        with pytest.raises(ZeroDivisionError):
            company.said[1].verdict()
        assert company.said[2].verdict()


class MistakenError(Exception):
    """An error that a pruner raises, and that cannot be copied: what it is made of is not told."""

    def __init__(self, what: str, *, told: str) -> None:
        super().__init__(what)
        self.told = told


@pytest.mark.parametrize("error", [TrialLostError(), StoreRefusedError("full"), ValueError("no")])
def test_nothing_is_left_of_who_is_over_while_nobody_reports(
    file_url: str, assemble: Assemble, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    company = assemble(file_url, 1, pruner=BELOW_HALF)

    class Model:
        pass

    def ask(*_: Any) -> bool:
        raise type(error)(*error.args) from KeyError("the reason")

    def train(said: Reports) -> weakref.ref[Model]:
        model = Model()
        with pytest.raises(type(error), match=f"^{error}$") as raised:
            said.tell(1, 0.25)
        assert isinstance(raised.value.__cause__, KeyError)
        assert raised.traceback[-1].name == "ask"
        return weakref.ref(model)

    monkeypatch.setattr(held, "should_prune", ask)
    kept = company.said[0]
    model, attempt = train(kept), weakref.ref(kept)
    gc.collect()
    assert model() is None
    kept.close()
    del kept
    company.said.clear()
    until = time.monotonic() + 10
    while attempt() is not None and time.monotonic() < until:  # the thread is on its way to wait
        gc.collect()
        time.sleep(0.01)
    assert attempt() is None


def test_an_error_that_cannot_be_copied_is_raised_all_the_same(
    file_url: str, assemble: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    company = assemble(file_url, 1, pruner=BELOW_HALF)

    def ask(*_: Any) -> bool:
        raise MistakenError("a pruner's own mistake", told="so")

    monkeypatch.setattr(held, "should_prune", ask)
    with pytest.raises(MistakenError, match="own mistake"):
        company.said[0].tell(1, 0.25)


def test_a_value_that_cannot_be_stored_ends_its_own_attempt(url: str, assemble: Assemble) -> None:
    company = assemble(url, 3, pruner=BELOW_HALF)
    for said, value in zip(company.said, (0.25, "no number", 0.75), strict=True):
        said.put(1, value)  # type: ignore[arg-type]
    assert company.said[0].verdict()
    with pytest.raises(TypeError):
        company.said[1].verdict()
    assert not company.said[2].verdict()
    assert [company.stored(index) for index in range(3)] == [{1: 0.25}, {}, {1: 0.75}]


def test_a_store_that_refuses_ends_all_who_reported(file_url: str, assemble: Assemble) -> None:
    company = assemble(file_url, 3)

    def full(store: Any, reports: Any) -> set[int]:
        raise StoreRefusedError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "report_all", full)
        for said in company.said[:2]:
            said.put(1, 0.5)
        for said in company.said[:2]:
            with pytest.raises(StoreRefusedError):
                said.settle(60)
    company.said[2].put(1, 0.5)  # which had nothing to say just then
    assert company.said[2].settle(60)


def test_what_fails_half_way_is_done_again(
    file_url: str,
    assemble: Assemble,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    company = assemble(file_url, 3, pruner=BELOW_HALF)
    asked: list[int] = []
    should_prune = held.should_prune

    def ask(store: Any, study: Any, claimed: queue.Claim, epoch: int, told: Any) -> bool:
        asked.append(claimed.number)
        if asked in ([0, 1], [0, 1, 1]):
            raise StoreUnreachableError("gone")
        return should_prune(store, study, claimed, epoch, told)

    monkeypatch.setattr(held, "should_prune", ask)
    for said in company.said:
        said.put(1, 0.25)
    company.said[0].verdict()
    until = time.monotonic() + 20
    while len(asked) < 5 and time.monotonic() < until:  # by itself, nobody says anything
        time.sleep(0.05)
    assert asked == [0, 1, 1, 1, 2]
    assert all(said.settle(60) for said in company.said)
    assert [said.verdict() for said in company.said] == [True] * 3
    assert caplog.text.count("training goes on") == 1


def test_nobody_waits_again_for_a_store_that_hangs(
    file_url: str,
    assemble: Assemble,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(reports, "_WAIT_S", 1.0)
    company = assemble(file_url, 6, pruner=BELOW_HALF)
    with contextlib.closing(sqlite3.connect(file_url.removeprefix("sqlite:///"))) as other:
        other.execute("BEGIN IMMEDIATE")  # nobody else can write now
        for said in company.said:
            said.put(1, 0.25)
        began = time.monotonic()
        assert [said.verdict() for said in company.said] == [False] * 6
        assert 0.9 < time.monotonic() - began < 3
        assert not company.said[0].settle(0.1)
        other.rollback()
    assert [said.settle(60) for said in company.said] == [True] * 6
    assert [said.verdict() for said in company.said] == [True] * 6
    assert caplog.text.count("training goes on") == 1


def test_that_nobody_reports_any_more_is_no_answer_of_the_store(
    file_url: str,
    assemble: Assemble,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(reports, "pause_s", lambda _failures: 0.01)
    company = assemble(file_url, 2, pruner=BELOW_HALF)
    first, second = company.said
    report_all = held.report_all
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):

        def away(*_: object) -> set[int]:
            raise StoreUnreachableError("gone")

        patch.setattr(held, "report_all", away)
        assert not first.tell(1, 0.25)
        first.close()
        time.sleep(0.5)  # the thread finds nothing to report
        assert not second.tell(1, 0.25)
        patch.setattr(held, "report_all", report_all)
        assert second.settle(60)
    assert second.verdict()
    assert caplog.text.count("training goes on") == 1
    assert caplog.text.count("the store answers again, 1 reports were missing") == 1


def test_a_thread_that_cannot_be_started_is_started_later(
    file_url: str, assemble: Assemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    company = assemble(file_url, 1, pruner=BELOW_HALF)
    (said,) = company.said
    with monkeypatch.context() as patch:

        def start(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            said.tell(1, 0.25)
    assert said.verdict()


@pytest.mark.postgres
def test_who_leaves_while_the_store_is_away_leaves_the_others(
    postgres: Postgres, assemble: Assemble, caplog: pytest.LogCaptureFixture
) -> None:
    company = assemble(postgres.url, 3, pruner=BELOW_HALF)
    first, second, third = company.said
    assert [said.tell(1, 0.75) for said in company.said] == [False] * 3
    postgres.kill()
    with caplog.at_level(logging.INFO):
        for said in company.said:
            said.put(2, 0.25)
        assert [said.verdict() for said in company.said] == [False] * 3
        first.close()
        assert not second.tell(3, 0.25)
        postgres.start()
        assert second.settle(60)
        assert third.settle(60)
        assert second.verdict()
        assert third.verdict()
    assert [company.stored(index) for index in range(3)] == [
        {1: 0.75},
        {1: 0.75, 2: 0.25, 3: 0.25},
        {1: 0.75, 2: 0.25},
    ]
    assert caplog.text.count("training goes on") == 1
    assert caplog.text.count("the store answers again, 3 reports were missing") == 1


def test_those_that_join_are_beaten_for_together(file_url: str, assemble: Assemble) -> None:
    company = assemble(file_url, 8)
    beats: list[set[int]] = []

    def beat(_store: Store, claims: Any) -> None:
        beats.append({claimed.number for claimed in claims})

    presence = Presence(name="me", host="h", pid=1, device="cpu", launcher="manual")
    heart = Heart(company.store, Signals(), presence, parent=None)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(held, "beat", beat)
        heart.start()
        for claimed in company.claims:
            stack.enter_context(heart.beating(company.study, claimed))
            time.sleep(0.05)
        until = time.monotonic() + 20
        while (not beats or len(beats[-1]) < 8) and time.monotonic() < until:
            time.sleep(0.05)
    assert beats[-1] == set(range(8))
    assert len(beats) <= 3


@pytest.mark.parametrize("again", [False, True], ids=["another study", "the same study"])
def test_what_was_asked_of_trials_that_are_over_is_not_asked_of_the_next(
    file_url: str, assemble: Assemble, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    company = assemble(file_url, 2)
    first, second = company.claims
    there = company.study
    if not again:
        with company.store.exclusively():
            named = there.spec.model_copy(update={"name": "other"})
            there = studies.create(company.store, named) or there
        assert there.id != company.study.id
    asked: list[int] = []
    on_its_way, may_arrive = threading.Event(), threading.Event()

    def control(_store: Store, study_id: int) -> Control:
        asked.append(study_id)
        if len(asked) > 1:
            return Control.RUN
        on_its_way.set()
        may_arrive.wait(20)
        return Control.CANCEL

    monkeypatch.setattr(studies, "control", control)
    told: list[Control] = []
    monkeypatch.setattr(workers, "tell", lambda *_: told.append(heart.asked))
    presence = Presence(name="me", host="h", pid=1, device="cpu", launcher="manual")
    heart = Heart(company.store, Signals(), presence, parent=None)
    heart.start()
    with heart.beating(company.study, first):
        assert on_its_way.wait(20)
    with heart.beating(there, second):
        may_arrive.set()
        until = time.monotonic() + 20
        while not told and time.monotonic() < until:
            time.sleep(0.01)
    assert told[0] is Control.RUN


def test_what_was_asked_of_trials_is_asked_while_one_of_them_trains(
    file_url: str, assemble: Assemble
) -> None:
    company = assemble(file_url, 2)
    studies.ask(company.store, company.study.id, Control.CANCEL)
    presence = Presence(name="me", host="h", pid=1, device="cpu", launcher="manual")
    heart = Heart(company.store, Signals(), presence, parent=None)
    heart.start()
    with heart.beating(company.study, company.claims[0]):
        until = time.monotonic() + 20
        while heart.asked is Control.RUN and time.monotonic() < until:
            time.sleep(0.01)
        assert heart.asked is Control.CANCEL

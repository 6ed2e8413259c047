"""What a controller does about the studies of a store, look by look, without waiting for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sweeper.service.board import Board
from sweeper.service.finish import Finished, Finishing
from sweeper.service.watch import Finisher, Watch
from sweeper.settings import Settings
from sweeper.store import (
    Control,
    Outcome,
    Store,
    StoredStudy,
    held,
    open_store,
    queue,
    recovery,
    standing,
    studies,
    tickets,
)
from sweeper.store import attributes as attr
from sweeper.study.spec import StudySpec
from sweeper.tracking import TrackingService


class Asked(Finisher):
    """Notes what is to be finished, and leaves it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def ask(self, study: StoredStudy) -> None:
        self.names.append(study.name)


class Bench:
    def __init__(self, folder: Path) -> None:
        settings = Settings.resolve(home=folder, environment={})
        self.store: Store = open_store(settings.store_url)
        self.board = Board()
        self.watch = Watch(
            store=self.store,
            settings=settings,
            service=TrackingService(settings),
            board=self.board,
        )
        self.finisher = self.watch.finisher = Asked()

    def add(self, name: str, trials: int = 3, stop: Mapping[str, int] | None = None) -> StoredStudy:
        spec = StudySpec.model_validate(
            {
                "name": name,
                "data": {"name": "digits"},
                "model": {"name": "mlp"},
                "search": {"trials": trials, "stop": stop or {}},
                "parameters": {"optimizer.lr": {"low": 1.0e-4, "high": 0.1, "log": True}},
            }
        )
        with self.store.exclusively():
            study = studies.create(self.store, spec)
            if study is None:
                raise ValueError(f"{name} is there already")
            tickets.fill(self.store, study.id, spec, tickets.tickets(spec, with_reference=False))
        return study

    def end(self, study: StoredStudy, outcome: Outcome, error: str = "") -> None:
        claimed = queue.claim(self.store, study.id, "me")
        assert claimed is not None
        held.finish(
            self.store,
            study.study,
            claimed,
            outcome=outcome,
            values=[0.5] if outcome is Outcome.COMPLETED else [],
            facts={attr.ERROR: error} if error else {},
        )


@pytest.fixture
def bench(tmp_path: Path) -> Callable[[], Bench]:
    return lambda: Bench(tmp_path)


def test_a_study_is_finished_once_it_is_over_and_again_when_it_grows(
    bench: Callable[[], Bench],
) -> None:
    found = bench()
    study = found.add("one", trials=2)
    found.end(study, Outcome.COMPLETED)
    found.watch.look()
    assert found.finisher.names == []
    found.end(study, Outcome.COMPLETED)
    found.watch.look()
    assert found.finisher.names == ["one"]
    studies.remember_finished(found.store, study.id, standing(found.store, study).counts)
    found.watch.look()
    assert found.finisher.names == ["one"]
    with found.store.exclusively():
        tickets.fill(found.store, study.id, study.spec, [tickets.Ticket(key="more", values={})])
    found.watch.look()
    assert found.finisher.names == ["one"]
    found.end(study, Outcome.PRUNED)
    found.watch.look()
    assert found.finisher.names == ["one", "one"]


def test_a_stopped_study_is_finished_when_nothing_runs_any_more(
    bench: Callable[[], Bench],
) -> None:
    found = bench()
    study = found.add("one")
    found.end(study, Outcome.COMPLETED)
    assert queue.claim(found.store, study.id, "me") is not None
    studies.ask(found.store, study.id, Control.STOP)
    found.watch.look()
    assert found.finisher.names == []
    recovery.return_trials_of(found.store, study.id, "me")
    found.watch.look()
    assert found.finisher.names == ["one"]


def test_a_lost_trial_is_tried_again(bench: Callable[[], Bench]) -> None:
    found = bench()
    study = found.add("one", trials=1)
    assert queue.claim(found.store, study.id, "dead") is not None
    recovery.lose_trials_of(found.store, study.id, "dead")
    found.watch.look()
    counts = standing(found.store, study).counts
    assert (counts["waiting"], counts["retried"]) == (1, 1)
    assert found.finisher.names == []


def test_a_study_whose_first_trials_crash_alike_is_stopped_and_says_why(
    bench: Callable[[], Bench],
) -> None:
    found = bench()
    study, other = found.add("broken", trials=9), found.add("good")
    for _ in range(3):
        found.end(study, Outcome.CRASHED, "Traceback …\nZeroDivisionError: on purpose")
    found.watch.look()
    control, why = studies.asked(found.store, study.id)
    assert control is Control.STOP
    assert "on purpose" in why
    assert "sweeper retry broken" in why
    assert studies.asked(found.store, other.id) == (Control.RUN, "")


def test_a_study_that_has_enough_is_stopped_and_finished(bench: Callable[[], Bench]) -> None:
    found = bench()
    study = found.add("one", trials=9, stop={"failures": 1})
    found.end(study, Outcome.CRASHED)
    found.watch.look()
    control, why = studies.asked(found.store, study.id)
    assert (control, found.finisher.names) == (Control.STOP, [])
    assert "search.stop.failures: 1" in why
    found.watch.look()
    assert found.finisher.names == ["one"]


def test_a_study_that_cannot_be_read_keeps_no_other_waiting(
    bench: Callable[[], Bench], caplog: pytest.LogCaptureFixture
) -> None:
    found = bench()
    broken, good = found.add("broken", trials=1), found.add("good", trials=1)
    found.end(good, Outcome.COMPLETED)
    spec = {**json.loads(broken.spec.stored()), "hindsight": True}
    broken.study.set_user_attr(attr.SPEC, json.dumps(spec))
    for _ in range(3):
        found.watch.look()
    assert set(found.finisher.names) == {"good"}
    assert caplog.text.count("broken cannot be looked after") == 1


def test_what_is_seen_is_on_the_board(bench: Callable[[], Bench]) -> None:
    found = bench()
    assert found.board.trouble
    found.add("one")
    found.watch.look()
    assert found.board.trouble == ""
    assert [tally.counts["waiting"] for tally in found.board.snapshot.tallies] == [3]


@pytest.mark.parametrize("over", [True, False])
def test_the_end_of_a_study_removes_its_checkpoints(
    bench: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    """Not those of a stopped one, which may go on."""
    monkeypatch.setattr(Finishing, "finish", lambda *_: Finished(page=None))
    found = bench()
    study, other = found.add("one", trials=1), found.add("other")
    left, others = (
        Path(found.watch.settings.checkpoints) / each.identity / "000000/epoch-000001.ckpt"
        for each in (study, other)
    )
    for file in (left, others):
        file.parent.mkdir(parents=True)
        file.touch()
    if over:
        found.end(study, Outcome.COMPLETED)
    else:
        studies.ask(found.store, study.id, Control.STOP)
    assert found.watch._finish(study)
    assert (left.exists(), others.exists()) == (not over, True)


def test_a_study_that_cannot_be_finished_now_is_tried_later(tmp_path: Path) -> None:
    study = Bench(tmp_path).add("one")
    tried: list[str] = []

    def finish(each: StoredStudy) -> bool:
        tried.append(each.name)
        return False

    finisher = Finisher(finish)
    finisher.ask(study)
    finisher.ask(study)
    while study.id not in finisher._not_before:
        time.sleep(0.01)
    finisher.ask(study)  # not before a minute has passed
    assert finisher.close(10)
    assert tried == ["one"]

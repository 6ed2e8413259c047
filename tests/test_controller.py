"""The controller's own decisions, on a real store with workers that only seem to run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sweeper import controller
from sweeper.address import refuse_tracking_uri
from sweeper.controller import (
    Outage,
    QuickDeaths,
    Sweep,
    prepare,
    refuse_if_changed,
    refuse_if_out_of_reach,
)
from sweeper.errors import (
    OutOfReachError,
    StoreRefusedError,
    StoreUnreachableError,
    StudyChangedError,
    UsageError,
    WorkersFailedError,
)
from sweeper.launchers import Job, Process
from sweeper.settings import Settings
from sweeper.store import (
    Control,
    Outcome,
    Store,
    StoredStudy,
    held,
    open_store,
    queue,
    standing,
    studies,
)
from sweeper.store import attributes as attr
from sweeper.study.spec import StudySpec

SPEC = {
    "name": "study",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "search": {"trials": 12, "sampler": "random"},
    "parameters": {"optimizer.lr": {"low": 1.0e-4, "high": 0.1, "log": True}},
}


@dataclass
class Apparent:
    """A launcher whose workers are entries in a list, to be ended as the test wants."""

    running: list[Process] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    said: str = ""
    name: str = "local"
    elsewhere: bool = False

    def fitting(self, gpus: float) -> int:
        return 4

    def start(self, job: Job, count: int) -> list[Process]:
        self.jobs.append(job)
        new = [
            Process(
                name=f"w{len(self.running) + index}",
                pid=None,
                device="cpu",
                exit_code=None,
                lived_s=0.0,
                log="a log",
            )
            for index in range(count)
        ]
        self.running += new
        return new

    def processes(self) -> list[Process]:
        return list(self.running)

    def log(self, name: str, lines: int = 20) -> str:
        return self.said

    def stop(self, *, now: bool = False) -> None:
        self.end(*(each.name for each in self.running if each.exit_code is None), code=-9)

    def end(self, *names: str, code: int, after_s: float = 1.0) -> None:
        self.running = [
            replace(each, exit_code=code, lived_s=after_s) if each.name in names else each
            for each in self.running
        ]

    @property
    def alive(self) -> list[str]:
        return [each.name for each in self.running if each.exit_code is None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


@pytest.fixture
def sweep(store: Store, tmp_path: Path) -> Callable[..., Sweep]:
    """A sweep of twelve trials with four apparent workers that has started."""

    def start(workers: int = 4, **sections: object) -> Sweep:
        prepared = prepare(store, StudySpec.model_validate({**SPEC, **sections}))
        made = Sweep(
            store=store,
            settings=Settings.resolve(home=tmp_path, environment={}),
            study=prepared.study,
            launcher=Apparent(),
            workers=workers,
        )
        made.start()
        return made

    return start


def crew(sweep: Sweep) -> Apparent:
    assert isinstance(sweep.launcher, Apparent)
    return sweep.launcher


def end_trial(study: StoredStudy, store: Store, outcome: Outcome, error: str = "") -> int:
    claimed = queue.claim(store, study.id, "w0")
    assert claimed is not None
    values = (0.5,) if outcome is Outcome.COMPLETED else ()
    facts = {attr.ERROR: error} if error else {}
    held.finish(store, study.study, claimed, outcome=outcome, values=values, facts=facts)
    return claimed.number


# --- a study that has what its file calls enough


def test_nobody_is_started_for_a_study_that_has_enough(
    sweep: Callable[..., Sweep], store: Store
) -> None:
    search = {"trials": 12, "sampler": "random", "stop": {"target": 0.5}}
    found = sweep(search=search)
    end_trial(found.study, store, Outcome.COMPLETED)
    assert found.tick().counts["complete"] == 1
    assert "search.stop.target" in found.enough
    assert studies.control(store, found.study.id) is Control.STOP
    crew(found).end(*crew(found).alive, code=0)
    found.tick()
    assert crew(found).alive == []
    again = sweep(search=search)  # as another launch of the same file
    assert (crew(again).jobs, again.enough) == ([], found.enough)
    assert studies.control(store, found.study.id) is Control.STOP
    more = sweep(search={**search, "stop": {"target": 0.6}})
    assert (len(crew(more).alive), more.enough) == (4, "")
    found.tick()  # goes by what the study is now, not by what it was when this launch began
    assert studies.control(store, found.study.id) is Control.RUN


# --- a study whose first trials all crash alike


@pytest.mark.parametrize("count", [3, 7, 12])
def test_trials_that_all_failed_alike_stop_the_study_however_many_ended_between_two_looks(
    sweep: Callable[..., Sweep], store: Store, count: int
) -> None:
    found = sweep()
    found.tick()
    for number in range(count):
        end_trial(found.study, store, Outcome.CRASHED, f"Traceback {number}\nKeyError: 'x'")
    with pytest.raises(WorkersFailedError, match=f"first {count} trials .* same way") as error:
        found.tick()
    assert "KeyError: 'x'" in str(error.value)
    assert "sweeper retry study" in str(error.value)


def test_two_failures_say_nothing_yet(sweep: Callable[..., Sweep], store: Store) -> None:
    found = sweep()
    for _ in range(2):
        end_trial(found.study, store, Outcome.CRASHED, "KeyError: 'x'")
    assert found.tick().counts["failed"] == 2


@pytest.mark.parametrize(
    "other",
    [
        (Outcome.CRASHED, "ValueError: another"),
        (Outcome.COMPLETED, ""),
        (Outcome.OUT_OF_MEMORY, "KeyError: 'x'"),
    ],
)
def test_one_trial_that_ended_differently_keeps_the_study_going(
    sweep: Callable[..., Sweep], store: Store, other: tuple[Outcome, str]
) -> None:
    found = sweep(faults={"on_out_of_memory": "fail"})
    for _ in range(5):
        end_trial(found.study, store, Outcome.CRASHED, "KeyError: 'x'")
    end_trial(found.study, store, *other)
    found.tick()


# --- workers that die


def test_workers_killed_together_count_once_and_are_replaced(sweep: Callable[..., Sweep]) -> None:
    found = sweep(workers=8)
    launcher = crew(found)
    launcher.end(*launcher.alive, code=-9)
    found.tick()
    assert launcher.alive == [f"w{index}" for index in range(8, 16)]


def test_starts_that_come_to_nothing_end_the_sweep_with_the_log(
    sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "_LONGEST_PAUSE_S", 0.0)
    found = sweep(workers=3)
    launcher = crew(found)
    launcher.said = "CUDA driver version is insufficient"
    for _ in range(4):
        launcher.end(*launcher.alive, code=1)
        found.tick()
        assert len(launcher.alive) == 3
    launcher.end(*launcher.alive, code=1)
    with pytest.raises(WorkersFailedError, match="started 5 times in a row") as error:
        found.tick()
    assert "driver version" in str(error.value)


def test_a_worker_that_lasts_keeps_a_sweep_alive_whose_others_die_at_once(
    sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "_LONGEST_PAUSE_S", 0.0)
    found = sweep(workers=2)
    launcher = crew(found)
    launcher.running[0] = replace(launcher.running[0], lived_s=60.0)
    for _ in range(10):
        launcher.end(launcher.alive[-1], code=1)
        found.tick()
    assert launcher.alive[0] == "w0"


def test_a_start_that_failed_twice_waits_before_the_next(sweep: Callable[..., Sweep]) -> None:
    found = sweep(workers=1)
    launcher = crew(found)
    for expected in (["w1"], []):
        launcher.end(*launcher.alive, code=1)
        found.tick()
        assert launcher.alive == expected


def test_deaths_are_counted_anew_after_one_that_came_late() -> None:
    deaths = QuickDeaths()
    seen: list[Process] = []

    def die(code: int, lived_s: float) -> int:
        process = Process(
            name=str(len(seen)), pid=1, device="cpu", exit_code=code, lived_s=lived_s, log=""
        )
        seen.append(process)
        deaths.saw(process, seen)
        return deaths.count

    assert [die(1, 1.0), die(-9, 2.0), die(1, 100.0), die(-11, 3.0), die(0, 1.0)] == [1, 2, 0, 1, 0]
    assert not deaths.pausing


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UsageError), (3, OutOfReachError)], ids=["usage", "out of reach"]
)
def test_a_worker_that_says_why_it_cannot_work_ends_the_sweep_with_its_words(
    sweep: Callable[..., Sweep], code: int, kind: type[Exception]
) -> None:
    found = sweep()
    crew(found).said = "12:00:00 INFO hello\nsweeper: the data must be there, but are not"
    crew(found).end("w0", code=code)
    with pytest.raises(kind, match=r"^the data must be there"):
        found.tick()


def test_a_dead_workers_trial_is_tried_again_once(
    sweep: Callable[..., Sweep], store: Store
) -> None:
    found = sweep()
    claimed = queue.claim(store, found.study.id, "w0")
    assert claimed is not None
    crew(found).end("w0", code=-9)
    for _ in range(3):
        now = found.tick()
    assert now.counts["retried"] == 1
    assert (now.budget, len(standing(store, found.study).rows)) == (12, 13)


# --- two controllers


def test_two_controllers_add_one_successor(sweep: Callable[..., Sweep], store: Store) -> None:
    """Both see the trial lost at the same moment, in threads with stores of their own."""
    first = sweep()
    for index in range(4):
        claimed = queue.claim(store, first.study.id, f"w{index}")
        assert claimed is not None
    crew(first).end("w0", "w1", "w2", "w3", code=-9)
    other_store = open_store(store.url.render_as_string(hide_password=False))
    second = replace(first, store=other_store, launcher=Apparent(running=crew(first).processes()))
    second._buried.clear()  # the two share nothing but the store
    threads = [threading.Thread(target=each.tick) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    now = standing(store, first.study)
    other_store.close()
    assert (now.counts["retried"], now.counts["waiting"], len(now.rows)) == (4, 12, 16)
    assert now.budget == 12


def test_preparing_again_adds_nothing(sweep: Callable[..., Sweep], store: Store) -> None:
    found = sweep()
    end_trial(found.study, store, Outcome.COMPLETED)
    again = prepare(store, StudySpec.model_validate(SPEC))
    assert (again.new, again.enqueued) == (False, 0)
    assert len(standing(store, again.study).rows) == 12


def test_another_file_of_the_same_name_is_refused(
    sweep: Callable[..., Sweep], store: Store
) -> None:
    sweep()
    with pytest.raises(StudyChangedError, match=r"model\.name"):
        prepare(store, StudySpec.model_validate({**SPEC, "model": {"name": "svm"}}))


def test_all_files_are_looked_at_before_one_is_begun(
    sweep: Callable[..., Sweep], store: Store
) -> None:
    sweep()
    new = StudySpec.model_validate({**SPEC, "name": "new"})
    more = StudySpec.model_validate({**SPEC, "search": {"trials": 13, "sampler": "random"}})
    with pytest.raises(StudyChangedError, match="--extend"):
        refuse_if_changed(store, [new, more])
    refuse_if_changed(store, [new, more], extend=True)
    assert studies.names(store) == ["study"]


def test_a_sweep_that_was_stopped_starts_nobody(sweep: Callable[..., Sweep], store: Store) -> None:
    found = sweep()
    claimed = queue.claim(store, found.study.id, "w1")
    assert claimed is not None
    found.stop(now=True)
    now = found.tick()
    assert crew(found).alive == []
    assert (now.counts["waiting"], now.counts["retried"]) == (12, 0)


def test_only_a_study_that_came_from_a_file_lets_workers_import(
    sweep: Callable[..., Sweep],
) -> None:
    found = sweep()
    assert "--allow-imports" not in found.job.argv
    found.allow_imports = True
    assert "--allow-imports" in found.job.argv


# --- the store is away


def test_workers_get_the_logins_by_environment_and_never_by_command_line(
    sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    logins = {
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "s1",
        "PGPASSWORD": "s2",
    }
    for name, value in logins.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PGPASSFILE", "/only/here")
    job = sweep().job
    assert logins.items() <= job.environment.items()
    assert "PGPASSFILE" not in job.environment
    assert not {"s1", "s2"} & set(job.argv)
    assert "s1" not in repr(job)


def test_an_outage_is_borne_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(controller.time, "monotonic", lambda: clock[0])
    away, error = Outage(), StoreUnreachableError("no answer")
    assert "go on without the store" in away.goes_on(error)
    clock[0] += 3599
    assert "no answer" in away.goes_on(error)
    away.ended()
    clock[0] += 3599
    away.goes_on(error)
    clock[0] += 3601
    with pytest.raises(StoreUnreachableError):
        away.goes_on(error)


def test_what_waiting_does_not_mend_is_not_waited_for() -> None:
    with pytest.raises(StoreRefusedError, match="disk is full"):
        Outage().goes_on(StoreRefusedError("the disk is full"))


FAR = {
    "SWEEPER_STORE": "postgresql+psycopg://db.example.org/s",
    "MLFLOW_TRACKING_URI": "http://m:5000",
}


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, "must reach the store"),
        ({"SWEEPER_STORE": "postgresql+psycopg://me:geheim@localhost/s"}, "must reach the store"),
        ({"SWEEPER_STORE": "postgresql+psycopg://127.0.0.2/s"}, "must reach the store"),
        ({"SWEEPER_STORE": "postgresql+psycopg:///s?host=/run/postgresql"}, "must reach the store"),
        ({"MLFLOW_TRACKING_URI": ""}, "MLFLOW_TRACKING_URI is not set"),
        ({"MLFLOW_TRACKING_URI": "http://u:geheim@127.0.0.1:5000"}, "must reach MLflow"),
        ({"MLFLOW_TRACKING_URI": "sqlite:////x/mlflow.db"}, "must reach MLflow"),
    ],
)
def test_workers_elsewhere_must_reach_store_and_tracker(
    environment: dict[str, str], part: str
) -> None:
    """Those on this machine need nothing of the kind."""
    settings = Settings.resolve(environment={**FAR, **environment} if environment else {})
    with pytest.raises(UsageError, match=part) as caught:
        refuse_if_out_of_reach(settings, Apparent(name="ray", elsewhere=True))
    assert "geheim" not in str(caught.value)
    refuse_if_out_of_reach(settings, Apparent())
    refuse_if_out_of_reach(Settings.resolve(environment=FAR), Apparent(elsewhere=True))
    named = {**FAR, "SWEEPER_STORE": "postgresql+psycopg:///s?host=db.example.org"}
    refuse_if_out_of_reach(Settings.resolve(environment=named), Apparent(elsewhere=True))


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("./mlruns", "but got a folder"),
        ("foo", "but got a folder"),
        ("file:///x/mlruns", "but got a folder"),
        ("  ", "but got nothing"),
        ("http://", "but got no host"),
        ("http://[::1", "but got no host"),
        ("localhost:5000", "but got the scheme 'localhost'"),
        ("me:geheim@host", "but got the scheme 'me'"),
    ],
)
def test_where_mlflow_cannot_be_is_said_before_the_training(uri: str, part: str) -> None:
    settings = Settings.resolve(environment={"MLFLOW_TRACKING_URI": uri})
    with pytest.raises(UsageError, match=part) as caught:
        refuse_if_out_of_reach(settings, Apparent())
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "http://127.0.0.1:5000",
        "https://me:pw@host/x",
        "sqlite:///mlflow.db",
        "postgresql+psycopg://me@host/runs",
        "databricks",
        "databricks://profile",
    ],
)
def test_where_mlflow_may_be(uri: str | None) -> None:
    refuse_tracking_uri(uri, {})


def test_a_folder_is_taken_where_mlflow_was_told_to() -> None:
    refuse_tracking_uri("./mlruns", {"MLFLOW_ALLOW_FILE_STORE": "true"})


def test_only_a_worker_of_this_machine_is_tied_to_its_launch(
    sweep: Callable[..., Sweep],
) -> None:
    here, there = sweep(), sweep()
    there.launcher = Apparent(name="ray", elsewhere=True)
    assert "--tied" in here.job.argv
    assert "--tied" not in there.job.argv
    assert there.job.environment["SWEEPER_LAUNCHER"] == "ray"

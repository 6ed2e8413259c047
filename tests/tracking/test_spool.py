"""Nothing is lost and nothing doubled, whatever happens to server, network and processes."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sweeper.errors import TrackerRefusedError
from sweeper.settings import ATTEMPT_TAG, RUN_KEY_TAG, TRIAL_TAG, Owner
from sweeper.tracking import RunStart, SpoolTracker, journal, replay, shipping, spool
from sweeper.tracking import mlflow as server
from sweeper.tracking.batch import Batch
from sweeper.tracking.journal import left_behind
from sweeper.tracking.records import Record

pytestmark = pytest.mark.mlflow

Begin = Callable[..., RunStart]
NOW = 1_790_000_000_000
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens

WRITER = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[5:]
from sweeper.tracking import RunStart, SpoolTracker
spool, address, experiment, first = sys.argv[1:5]
tracker = SpoolTracker(Path(spool), address, gather_s=0.05)
for number in range(int(first), int(first) + 2):
    key = f"{experiment}/{number}"
    tracker.start(RunStart(key=key, experiment=experiment, name=f"{number:04d}",
                           start_time_ms=1790000000000))
    for epoch in range(1, 41):
        tracker.log(key, {"a": number + epoch / 100, "b": 0.5}, epoch, 1790000000000 + epoch)
    tracker.end(key, status="FINISHED", end_time_ms=1790000001000)
print("said", flush=True)
if address == "http://127.0.0.1:9":
    with open(next(Path(spool).glob("*.jsonl")), "ab") as torn:
        torn.write(b'{"n": 999, "kind": "lo')
    os.kill(os.getpid(), 9)
print(tracker.close(60), flush=True)
"""


def writer(spool: Path, address: str, experiment: str, first: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(spool), address, experiment, str(first), *sys.path],
        stdout=subprocess.PIPE,
        text=True,
    )


def history(address: str, experiment: str) -> dict[str, list[tuple[int, float]]]:
    """Key → the points of the metric ``a``, every one that MLflow holds; and no key twice."""
    client = server.connect(address)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=1000)
    keys = [run.data.tags[RUN_KEY_TAG] for run in runs]
    assert len(keys) == len(set(keys)), "a run was created twice"
    return {
        key: sorted(
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, "a")
        )
        for key, run in zip(keys, runs, strict=True)
    }


def status(address: str, start: RunStart) -> str:
    client = server.connect(address)
    return server.get_run(client, server.run_ids(client, start.experiment)[start.key]).info.status


def test_several_processes_and_threads_arrive_exactly_once(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    experiment = begin().experiment
    processes = [writer(tmp_path, mlflow_server, experiment, first) for first in (0, 2)]
    with SpoolTracker(tmp_path, mlflow_server, gather_s=0.05) as tracker:

        def trial(number: int) -> None:
            start = begin(number)
            tracker.start(start)
            for epoch in range(1, 41):
                tracker.log(start.key, {"a": number + epoch / 100, "b": 0.5}, epoch, NOW + epoch)
            tracker.end(start.key, status="FINISHED", end_time_ms=NOW + 1000)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(trial, range(4, 8)))
        assert tracker.flush(60) == 0
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert output.split() == ["said", "0"]

    assert history(mlflow_server, experiment) == {
        f"{experiment}/{number}": [(epoch, number + epoch / 100) for epoch in range(1, 41)]
        for number in range(8)
    }
    assert {status(mlflow_server, begin(number)) for number in range(8)} == {"FINISHED"}
    assert left_behind(tmp_path) == []  # each journal is deleted by whoever ends cleanly


def test_an_outage_in_the_middle_costs_nothing(
    proxy, mlflow_server: str, begin: Begin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = begin()
    with (
        caplog.at_level(logging.INFO, "sweeper"),
        SpoolTracker(tmp_path, proxy.address, gather_s=0.02) as tracker,
    ):
        tracker.start(start)
        for epoch in range(1, 61):
            tracker.log(start.key, {"a": float(epoch)}, epoch, NOW + epoch)
            if epoch == 20:
                assert tracker.flush(20) == 0
                proxy.cut()
            if epoch == 40:
                assert tracker.flush(0.3) == 20
                proxy.connect()
            time.sleep(0.005)
        tracker.end(start.key, status="FINISHED", end_time_ms=NOW + 1000)
        assert tracker.flush(30) == 0
    points = history(mlflow_server, start.experiment)[start.key]
    assert points == [(epoch, float(epoch)) for epoch in range(1, 61)]
    assert status(mlflow_server, start) == "FINISHED"
    told = [message for message in caplog.messages if "MLflow" in message]
    assert len(told) == 2, told  # once out of reach, once back, however often it was tried
    assert "out of reach" in told[0]
    assert "answers again" in told[1]


def test_answers_that_never_arrive_double_nothing(
    proxy, mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    """The server does what it is asked, and the answer is lost: every call is made again."""
    notes = tmp_path / "notes.txt"
    notes.write_text("x")
    with SpoolTracker(tmp_path / "spool", proxy.address, gather_s=0.01) as tracker:
        start = begin(params={"lr": 0.1}, dataset={"name": "d", "digest": "1", "source": "x"})
        proxy.swallow_answers = 4
        tracker.start(start)
        for epoch in range(1, 11):
            if epoch % 3 == 0:
                assert tracker.flush(30) == 0
                proxy.swallow_answers = 2
            tracker.log(start.key, {"a": float(epoch)}, epoch, NOW + epoch)
        tracker.artifact(start.key, notes)
        proxy.swallow_answers = 2
        tracker.end(start.key, status="FINISHED", metrics={"end": 1.0}, end_time_ms=NOW + 1000)
        assert tracker.flush(60) == 0
    assert proxy.swallowed >= 8
    assert history(mlflow_server, start.experiment) == {
        start.key: [(epoch, float(epoch)) for epoch in range(1, 11)]
    }
    client = server.connect(mlflow_server)
    run_id = server.run_ids(client, start.experiment)[start.key]
    assert len(client.get_metric_history(run_id, "end")) == 1
    assert len(server.get_run(client, run_id).inputs.dataset_inputs) == 1
    assert [file.path for file in client.list_artifacts(run_id)] == ["notes.txt"]


def test_with_the_server_down_no_call_waits_and_a_replay_delivers(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    start = begin(params={"lr": 0.1})
    took = []

    def timed(call: Callable[..., None], *args: object, **kwargs: object) -> None:
        began = time.perf_counter()
        call(*args, **kwargs)
        took.append(time.perf_counter() - began)

    tracker = SpoolTracker(tmp_path, NOWHERE)
    timed(tracker.start, start)
    for epoch in range(1, 101):
        timed(tracker.log, start.key, {"a": float(epoch)}, epoch, NOW + epoch)
    timed(tracker.end, start.key, status="FINISHED", end_time_ms=NOW + 1000)
    assert sorted(took)[50] < 1e-3
    assert tracker.close(0.5) == 102

    ids: dict[str, str] = {}
    report = replay(tmp_path, NOWHERE)
    assert (report.delivered, report.left) == (0, 102)
    assert report.problem is not None
    assert "127.0.0.1" in report.problem
    report = replay(tmp_path, mlflow_server, on_run_id=ids.__setitem__)
    assert (report.delivered, report.left, report.problem) == (102, 0, None)
    assert history(mlflow_server, start.experiment) == {
        start.key: [(epoch, float(epoch)) for epoch in range(1, 101)]
    }
    assert ids == server.run_ids(server.connect(mlflow_server), start.experiment)
    assert left_behind(tmp_path) == []
    assert replay(tmp_path, mlflow_server).delivered == 0


def test_a_killed_writer_loses_only_the_line_it_was_writing(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    experiment = begin().experiment
    process = writer(tmp_path, NOWHERE, experiment, 0)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (-signal.SIGKILL, "said\n")

    reports = []
    together = [
        threading.Thread(target=lambda: reports.append(replay(tmp_path, mlflow_server)))
        for _ in range(3)
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert sum(report.delivered for report in reports) == 84
    assert sum(report.torn for report in reports) == 1
    assert history(mlflow_server, experiment) == {
        f"{experiment}/{number}": [(epoch, number + epoch / 100) for epoch in range(1, 41)]
        for number in range(2)
    }


def test_a_replay_leaves_a_live_writer_alone(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    start = begin()
    tracker = SpoolTracker(tmp_path, NOWHERE)
    tracker.start(start)
    report = replay(tmp_path, mlflow_server)
    assert (report.live, report.delivered) == (1, 0)
    tracker.close(0.1)
    assert replay(tmp_path, mlflow_server).delivered == 1


def test_what_mlflow_refuses_is_set_aside_and_blocks_nothing(
    mlflow_server: str, begin: Begin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = begin(params={"lr": 0.1})
    with SpoolTracker(tmp_path, mlflow_server, gather_s=0.2) as tracker:
        tracker.start(start)
        tracker.note(start.key, params={"lr": 0.2, "other": 1}, tags={"kept": "yes"})
        tracker.log(start.key, {"a": 1.0}, 1, NOW + 1)
        tracker.log(start.key, {"a": 2.0}, 2, -5)  # no time that MLflow takes
        tracker.log(start.key, {"a": 3.0}, 3, NOW + 3)
        assert tracker.flush(30) == 0
    assert history(mlflow_server, start.experiment) == {start.key: [(1, 1.0), (3, 3.0)]}
    client = server.connect(mlflow_server)
    run = server.get_run(client, server.run_ids(client, start.experiment)[start.key])
    assert run.data.params == {"lr": "0.1", "other": "1"}
    assert run.data.tags["kept"] == "yes"

    [file] = tmp_path.glob("*.rejected.jsonl")
    refused = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["params"] for entry in refused if entry["params"]] == [{"lr": "0.2"}]
    assert [p["step"] for entry in refused for p in entry["metrics"]] == [2]
    assert all(entry["key"] == start.key and entry["reason"] for entry in refused)
    assert sum("set aside" in message for message in caplog.messages) == 1  # once a run
    assert left_behind(tmp_path) == []


def test_a_record_at_which_the_server_fails_each_time_is_set_aside_in_the_end(
    mlflow_server: str, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = begin()
    tracker = SpoolTracker(tmp_path, NOWHERE)
    tracker.start(start)
    for epoch in range(1, 6):
        tracker.log(start.key, {"a": float(epoch)}, epoch, NOW + epoch)
    tracker.log(start.key, {"poison": 1.0}, 3, NOW)
    tracker.close(0)

    log_batch, calls = server.log_batch, []

    def failing(client: object, run_id: str, batch: Batch) -> None:
        calls.append(len(batch))
        if any(point.name == "poison" for point in batch.metrics):
            raise server.ServerFailedError("the server fails at this")
        log_batch(client, run_id, batch)

    monkeypatch.setattr(server, "log_batch", failing)
    monkeypatch.setattr("sweeper.tracking.spool._FIRST_PAUSE_S", 0.01)
    report = replay(tmp_path, mlflow_server)
    assert (report.left, report.rejected, report.problem) == (0, 1, None)
    assert len(calls) > 10  # chance is ruled out first
    assert history(mlflow_server, start.experiment) == {
        start.key: [(epoch, float(epoch)) for epoch in range(1, 6)]
    }


@contextlib.contextmanager
def failing_server(target: str) -> Iterator[tuple[str, dict[str, int]]]:
    """A way to the MLflow server, which answers with HTTP ``mode["code"]`` if that is not 0:
    everything, or with ``mode["reads"]`` only what is to be written."""
    mode = {"code": 0, "asked": 0, "reads": 0}

    class Between(http.server.BaseHTTPRequestHandler):
        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            reading = self.command == "GET" or self.path.endswith("/search")
            if mode["code"] and not (reading and mode["reads"]):
                mode["asked"] += 1
                code, answer = mode["code"], b"<html>maintenance</html>"
            else:
                request = urllib.request.Request(
                    target + self.path,
                    data=body or None,
                    method=self.command,
                    headers={"Content-Type": self.headers.get("Content-Type", "")},
                )
                try:
                    with urllib.request.urlopen(request) as reply:
                        code, answer = reply.status, reply.read()
                except urllib.error.HTTPError as error:
                    code, answer = error.code, error.read()
            self.send_response(code)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PATCH = do_PUT = _pass_on  # noqa: N815 - the library's names

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Between) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", mode
        web.shutdown()


@pytest.mark.parametrize(("code", "reads"), [(500, 0), (400, 0), (200, 0), (400, 1)])
def test_a_server_that_fails_at_everything_is_waited_for(
    code: int,
    reads: int,
    mlflow_server: str,
    begin: Begin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with a database that is read-only for some minutes, or a page of maintenance."""
    monkeypatch.setattr("sweeper.tracking.spool._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("sweeper.tracking.spool._LONGEST_PAUSE_S", 0.01)
    old, new = begin(1), begin(2)
    with (
        failing_server(mlflow_server) as (address, mode),
        SpoolTracker(tmp_path, address, gather_s=0.01) as tracker,
    ):
        tracker.start(old)
        tracker.log(old.key, {"a": 1.0}, 1, NOW + 1)
        assert tracker.flush(30) == 0
        mode.update(code=code, reads=reads)
        for start in (old, new):  # first what a run says that is there, then one that begins
            if start is new:
                tracker.start(new)
            tracker.log(start.key, {"a": 2.0}, 2, NOW + 2)
            asked, until = mode["asked"], time.monotonic() + 30
            while mode["asked"] < asked + 4 * shipping.PATIENCE and time.monotonic() < until:
                time.sleep(0.05)
        assert list(tmp_path.glob("*.rejected.jsonl")) == []
        mode["code"] = 0
        for start in (old, new):
            tracker.log(start.key, {"a": 3.0}, 3, NOW + 3)
        assert tracker.flush(30) == 0
    assert history(mlflow_server, old.experiment) == {
        old.key: [(1, 1.0), (2, 2.0), (3, 3.0)],
        new.key: [(2, 2.0), (3, 3.0)],
    }
    assert list(tmp_path.glob("*.rejected.jsonl")) == []


def test_what_was_refused_is_sent_again_when_asked_for(
    mlflow_server: str, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = begin(tags={"kept": "yes"}, params={"lr": 0.1})
    notes = tmp_path / "notes.txt"
    notes.write_text("x")

    def refuse(*_: object, **__: object) -> None:
        raise TrackerRefusedError("not now")

    with (
        SpoolTracker(tmp_path, mlflow_server, gather_s=0.05) as tracker,
        monkeypatch.context() as broken,
    ):
        for name in ("create_run", "log_batch", "log_artifact"):
            broken.setattr(server, name, refuse)
        tracker.start(start)
        tracker.log(start.key, {"a": 1.0}, 1, NOW + 1)
        tracker.artifact(start.key, notes)
        tracker.end(start.key, status="FINISHED", metrics={"end": 1.0}, end_time_ms=NOW + 10)
        assert tracker.flush(30) == 0
    [file] = journal.refused(tmp_path)
    assert (file.experiments, file.reason) == ({start.experiment}, "not now")
    assert replay(tmp_path, mlflow_server).delivered == 0
    sent = replay(tmp_path, mlflow_server, refused_too=True)
    assert (sent.delivered, sent.rejected, sent.left) == (4, 0, 0)

    assert history(mlflow_server, start.experiment) == {start.key: [(1, 1.0)]}
    client = server.connect(mlflow_server)
    run = server.get_run(client, server.run_ids(client, start.experiment)[start.key])
    assert (run.info.status, run.info.end_time) == ("FINISHED", NOW + 10)
    assert (run.data.params, run.data.tags["kept"]) == ({"lr": "0.1"}, "yes")
    assert run.data.metrics["end"] == 1.0
    assert [found.path for found in client.list_artifacts(run.info.run_id)] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() or "rej" in path.name] == []


def test_refused_records_of_older_versions_are_sent_again(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    start = begin()
    named = {"experiment": start.experiment, "key": start.key, "reason": "the server failed"}
    point = {"name": "a", "value": "2.0", "time_ms": NOW + 2, "step": 2}
    lines = [
        {**named, "kind": "start", "name": "0001", "params": {"lr": "0.1"}, "tags": {"t": "x"}},
        {**named, "kind": "log", "metrics": {"a": 1.0}, "step": 1, "tags": {}},
        {**named, "metrics": [point], "params": {"late": "1"}, "tags": {}},
        {**named, "kind": "end", "metrics": {}, "step": 2, "tags": {}, "status": "FINISHED"},
    ]
    file = tmp_path / "host-1-abc.rejected.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    assert replay(tmp_path, mlflow_server, refused_too=True).rejected == 0
    assert history(mlflow_server, start.experiment) == {start.key: [(1, 1.0), (2, 2.0)]}
    client = server.connect(mlflow_server)
    run = server.get_run(client, server.run_ids(client, start.experiment)[start.key])
    assert (run.data.params, run.data.tags["t"]) == ({"lr": "0.1", "late": "1"}, "x")
    assert (run.info.status, run.info.start_time > NOW) == ("FINISHED", True)
    assert journal.refused(tmp_path) == []


def test_a_run_that_people_delete_takes_the_rest_with_it_and_no_more(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    gone, other = begin(1), begin(2)
    ids: dict[str, str] = {}
    with SpoolTracker(tmp_path, mlflow_server, gather_s=0.02, on_run_id=ids.__setitem__) as tracker:
        tracker.start(gone)
        tracker.start(other)
        assert tracker.flush(30) == 0
        server.connect(mlflow_server).delete_run(ids[gone.key])
        tracker.log(gone.key, {"a": 1.0, "b": 1.0}, 1, NOW)
        tracker.log(other.key, {"a": 1.0}, 1, NOW)
        tracker.end(gone.key, status="FINISHED", end_time_ms=NOW)
        assert tracker.flush(30) == 0
    assert history(mlflow_server, other.experiment) == {other.key: [(1, 1.0)]}


def test_an_older_attempt_that_arrives_late_changes_neither_status_nor_tags(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    """The first worker dies cut off from the server; the trial is finished elsewhere; then sync."""
    first = begin(at_ms=NOW, tags={"attempt": "1", "only.first": "x"})
    lost = SpoolTracker(tmp_path / "one", NOWHERE)
    lost.start(first)
    for epoch in (1, 2, 3):
        lost.log(first.key, {"a": float(epoch)}, epoch, NOW + epoch)
    lost.end(first.key, status="KILLED", tags={"outcome": "lost"}, end_time_ms=NOW + 10)
    lost.close(0)

    second = begin(at_ms=NOW + 1000, tags={"attempt": "2"})
    with SpoolTracker(tmp_path / "two", mlflow_server) as tracker:
        tracker.start(second)
        for epoch in (3, 4):
            tracker.log(second.key, {"a": 10.0 + epoch}, epoch, NOW + 1000 + epoch)
        tracker.end(
            second.key, status="FINISHED", tags={"outcome": "completed"}, end_time_ms=NOW + 2000
        )
    assert replay(tmp_path / "one", mlflow_server).delivered == 5

    client = server.connect(mlflow_server)
    run = server.get_run(client, server.run_ids(client, first.experiment)[first.key])
    assert (run.info.status, run.info.end_time) == ("FINISHED", NOW + 2000)
    assert run.data.tags["attempt"] == "2"
    assert run.data.tags["outcome"] == "completed"
    assert run.data.tags["only.first"] == "x"
    assert history(mlflow_server, first.experiment) == {
        first.key: [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
    }


def test_an_older_attempt_that_arrives_beside_a_running_one_doubles_nothing(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    """The first worker is killed in an outage; sync sends what it left while the second trains."""
    first = begin(at_ms=NOW, tags=numbered(0, 1))
    second = begin(at_ms=NOW + 1000, tags=numbered(2, 1))
    lost = SpoolTracker(tmp_path, NOWHERE, writer="killed")
    lost.start(first)
    for epoch in range(1, 7):
        lost.log(first.key, {"a": float(epoch)}, epoch, NOW + epoch)
    lost.close(0)
    with SpoolTracker(tmp_path, mlflow_server, writer="heir") as tracker:
        tracker.start(second)
        for epoch in (1, 3):  # epoch 2 was not in its checkpoint
            tracker.log(second.key, {"a": float(epoch)}, epoch, NOW + epoch)
        assert tracker.flush(60) == 0
        assert replay(tmp_path, mlflow_server).delivered == 7
        for epoch in range(4, 9):
            tracker.log(second.key, {"a": 10.0 + epoch}, epoch, NOW + 1000 + epoch)
        tracker.end(second.key, status="FINISHED", end_time_ms=NOW + 2000)
        assert tracker.flush(60) == 0
    assert history(mlflow_server, first.experiment) == {
        first.key: [(1, 1.0), (2, 2.0), (3, 3.0), *((e, 10.0 + e) for e in range(4, 9))]
    }


@pytest.mark.parametrize("numbers", [(2, 1), (0, 2)])
def test_a_later_attempt_loses_nothing_though_its_clock_is_behind(
    mlflow_server: str, begin: Begin, tmp_path: Path, numbers: tuple[int, int]
) -> None:
    first = begin(at_ms=NOW + 600_000, tags=numbered(0, 1))
    second = begin(at_ms=NOW, tags=numbered(*numbers))
    with SpoolTracker(tmp_path, mlflow_server, writer="killed") as killed:
        killed.start(first)
        killed.log(first.key, {"a": 1.0}, 1, NOW + 600_001)
        assert killed.flush(60) == 0
    with SpoolTracker(tmp_path, mlflow_server, writer="heir") as heir:
        heir.start(second)
        for epoch in range(1, 6):
            heir.log(second.key, {"a": float(epoch)}, epoch, NOW + epoch)
        assert heir.flush(60) == 0
    assert history(mlflow_server, first.experiment) == {
        first.key: [(epoch, float(epoch)) for epoch in range(1, 6)]
    }


def numbered(trial: int, attempt: int) -> dict[str, str]:
    """The tags by which attempts are told apart."""
    return {TRIAL_TAG: str(trial), ATTEMPT_TAG: str(attempt)}


def test_a_writer_that_was_away_doubles_nothing_that_its_successor_wrote(
    begin: Begin, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = begin(at_ms=NOW), begin(at_ms=NOW + 1000)
    with (
        SpoolTracker(tmp_path, mlflow_server, writer="zombie") as zombie,
        SpoolTracker(tmp_path, mlflow_server, writer="heir") as heir,
    ):
        zombie.start(first)
        zombie.log(first.key, {"a": 1.0}, 1, NOW + 1)
        assert zombie.flush(60) == 0
        heir.start(second)
        heir.log(second.key, {"a": 2.0}, 2, NOW + 2000)
        assert heir.flush(60) == 0
        monkeypatch.setattr(shipping, "_AWAY_S", -1.0)  # as after a long sleep
        zombie.log(first.key, {"a": 2.5}, 2, NOW + 2)
        assert zombie.flush(60) == 0
    assert history(mlflow_server, first.experiment) == {first.key: [(1, 1.0), (2, 2.0)]}


def test_after_a_long_sending_the_thread_rests_unless_somebody_waits(
    mlflow_server: str, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is logged meanwhile costs no call of its own."""
    monkeypatch.setattr(spool, "_REST", 1e6)
    monkeypatch.setattr(spool, "_REST_SHARE", 1e6)
    monkeypatch.setattr(spool, "_LONGEST_REST_S", 600.0)
    sent: list[int] = []
    ship = shipping.Shipper.ship

    def counted(shipper: shipping.Shipper, records: Sequence[Record]) -> list[Path]:
        sent.append(len(records))
        return ship(shipper, records)

    synced = threading.Event()
    sync = journal.Journal.sync

    def kept(written: journal.Journal) -> None:
        sync(written)
        synced.set()

    monkeypatch.setattr(shipping.Shipper, "ship", counted)
    monkeypatch.setattr(journal.Journal, "sync", kept)
    start = begin()
    with SpoolTracker(tmp_path, mlflow_server, gather_s=0.01) as tracker:
        tracker.start(start)
        assert tracker.flush(60) == 0
        for epoch in range(1, 11):
            tracker.log(start.key, {"a": epoch / 10}, epoch, NOW + epoch)
            time.sleep(0.05)
        assert sent == [1]
        assert tracker.flush(60) == 0
        assert sent == [1, 10]
        assert not synced.is_set()
        tracker.end(start.key, status="FINISHED", end_time_ms=NOW + 20)
        assert synced.wait(60), "the end of a run must be on the disk though nothing is sent"
        assert sent == [1, 10]
    assert sent == [1, 10, 1]
    assert len(history(mlflow_server, start.experiment)[start.key]) == 10


def test_the_address_may_change_and_may_be_unknown_at_first(
    proxy, mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    known: list[str] = []
    start = begin()
    with SpoolTracker(tmp_path, lambda: known[-1] if known else None, gather_s=0.01) as tracker:
        tracker.start(start)
        assert tracker.flush(0.2) == 1
        known.append(proxy.address)
        assert tracker.flush(20) == 0
        proxy.cut()
        tracker.log(start.key, {"a": 1.0}, 1, NOW)
        assert tracker.flush(0.5) == 1
        known.append(mlflow_server)
        assert tracker.flush(20) == 0
    assert history(mlflow_server, start.experiment) == {start.key: [(1, 1.0)]}


def test_where_there_is_no_server_nobody_waits_for_one(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    """Longer than a test may take, if it did."""
    tracker = SpoolTracker(tmp_path, lambda: None)
    tracker.start(begin())
    assert tracker.close(3600) == 1
    assert replay(tmp_path, mlflow_server).delivered == 1


def test_a_long_journal_starts_afresh_once_all_of_it_has_arrived(
    mlflow_server: str, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeper.tracking.spool._RESTART_BYTES", 2000)
    start = begin()
    with SpoolTracker(tmp_path, mlflow_server, gather_s=0.01) as tracker:
        tracker.start(start)
        for epoch in range(1, 61):
            tracker.log(start.key, {"a": float(epoch)}, epoch, NOW + epoch)
            if epoch % 20 == 0:
                assert tracker.flush(20) == 0
                [path] = left_behind(tmp_path)
                assert path.stat().st_size == 0
    assert history(mlflow_server, start.experiment) == {
        start.key: [(epoch, float(epoch)) for epoch in range(1, 61)]
    }


def test_a_full_disk_costs_measurements_and_not_the_trial(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = SpoolTracker(tmp_path, NOWHERE)
    start = begin()
    tracker.start(start)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for epoch in range(1, 10):
        tracker.log(start.key, {"a": 1.0}, epoch, NOW)
    monkeypatch.undo()
    tracker.log(start.key, {"a": 1.0}, 10, NOW)
    assert tracker.close(0.1) == 2
    assert sum("takes no more records" in message for message in caplog.messages) == 1


def test_a_run_whose_start_found_the_disk_full_arrives_once_there_is_room(
    mlflow_server: str, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    start = begin(params={"lr": 0.1})
    with SpoolTracker(tmp_path, mlflow_server, gather_s=0.01) as tracker:
        with monkeypatch.context() as small:
            small.setattr(os, "write", full)
            tracker.start(start)
            tracker.log(start.key, {"a": 1.0}, 1, NOW + 1)
        for epoch in (2, 3):
            tracker.log(start.key, {"a": float(epoch)}, epoch, NOW + epoch)
        assert tracker.flush(30) == 0
    assert history(mlflow_server, start.experiment) == {start.key: [(2, 2.0), (3, 3.0)]}
    client = server.connect(mlflow_server)
    run = server.get_run(client, server.run_ids(client, start.experiment)[start.key])
    assert run.data.params == {"lr": "0.1"}


def test_a_run_begins_though_its_experiment_was_deleted_meanwhile(
    mlflow_server: str, begin: Begin, tmp_path: Path
) -> None:
    client = server.connect(mlflow_server)
    first, second = begin(1), begin(2)
    with SpoolTracker(tmp_path, mlflow_server, gather_s=0.01) as tracker:
        tracker.start(first)
        assert tracker.flush(30) == 0
        client.delete_experiment(server.experiment_id(client, first.experiment))
        tracker.start(second)
        tracker.log(second.key, {"a": 1.0}, 1, NOW + 1)
        assert tracker.flush(30) == 0
    assert history(mlflow_server, first.experiment)[second.key] == [(1, 1.0)]
    assert journal.refused(tmp_path) == []


def test_a_callback_that_fails_stops_nothing(
    mlflow_server: str, begin: Begin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(key: str, run_id: str) -> None:
        raise RuntimeError("the store is away")

    start = begin()
    with SpoolTracker(tmp_path, mlflow_server, gather_s=0.01, on_run_id=broken) as tracker:
        tracker.start(start)
        tracker.log(start.key, {"a": 1.0}, 1, NOW)
        assert tracker.flush(20) == 0
    assert any("the store is away" in message for message in caplog.messages)
    assert history(mlflow_server, start.experiment) == {start.key: [(1, 1.0)]}


def test_an_artifact_must_be_there(begin: Begin, tmp_path: Path) -> None:
    tracker = SpoolTracker(tmp_path, NOWHERE)
    start = begin()
    tracker.start(start)
    with pytest.raises(FileNotFoundError, match="must be a file"):
        tracker.artifact(start.key, tmp_path / "missing.txt")
    tracker.close(0)


def test_studies_of_one_name_have_runs_of_their_own(
    begin: Begin, mlflow_server: str, tmp_path: Path
) -> None:
    """Two people with a store each run the same file, and share the server."""
    theirs, mine = (Owner(identity=f"tiny-{who}", since_ms=NOW) for who in "ab")
    client = server.connect(mlflow_server)
    for attempt, owner in enumerate((theirs, mine, theirs)):
        start = begin(at_ms=NOW + attempt, owner=owner)
        with SpoolTracker(tmp_path, mlflow_server, gather_s=0.01) as tracker:
            tracker.start(start)
            assert tracker.flush(30) == 0
            tracker.log(start.key, {"a": 1.0}, 1 + attempt, NOW + 1)
            tracker.artifact(start.key, Path(__file__))
            assert tracker.flush(30) == 0
    found = {
        owner.identity: server.get_run(
            client, server.run_ids(client, start.experiment, owner)[start.key]
        )
        for owner in (theirs, mine)
    }
    assert {
        name: sorted(p.step for p in client.get_metric_history(run.info.run_id, "a"))
        for name, run in found.items()
    } == {"tiny-a": [1, 3], "tiny-b": [2]}
    assert len(server.list_runs(client, start.experiment)) == 2


def test_a_run_of_an_older_version_goes_on_where_it_is_the_studys(
    begin: Begin, mlflow_server: str, tmp_path: Path
) -> None:
    """It has no tag of its study: the store names it, or it began when the study was there."""
    client = server.connect(mlflow_server)
    old = [begin(number, at_ms=NOW) for number in range(4)]
    ids: dict[str, str] = {}
    with SpoolTracker(tmp_path, mlflow_server, on_run_id=ids.__setitem__) as tracker:
        for start in old:
            tracker.start(start)
        assert tracker.flush(30) == 0
    day = 86_400_000
    owners = [
        Owner(identity="s-1", since_ms=NOW - 5),
        Owner(identity="s-1", since_ms=NOW + day, run_ids=frozenset([ids[old[1].key]])),
        Owner(identity="s-2", since_ms=NOW + day),
        Owner(),
    ]
    with SpoolTracker(tmp_path, mlflow_server) as tracker:
        for number, owner in enumerate(owners):
            start = begin(number, at_ms=NOW + 2 * day, owner=owner)
            tracker.start(start)
            tracker.log(start.key, {"a": 1.0}, 1, NOW + 2 * day)
        assert tracker.flush(30) == 0
    runs = server.list_runs(client, old[0].experiment)
    assert len(runs) == 5
    continued = {run.info.run_id for run in runs if "a" in run.data.metrics}
    assert [ids[start.key] in continued for start in old] == [True, True, False, True]
    tagged = server.run_ids(client, old[0].experiment, Owner(identity="s-1"))
    assert tagged == {start.key: ids[start.key] for start in old[:2]}

"""The journal survives what happens to processes and disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.tracking.journal import Journal, JournalFiles, claimed, left_behind
from sweeper.tracking.records import Kind, Record


def record(number: int, text: str = "") -> Record:
    return Record(
        number=number,
        kind=Kind.LOG,
        key="s/1",
        experiment="s",
        started_ms=7,
        time_ms=number,
        data={"metrics": {"a": 1.5}, "step": number, "tags": {"t": text}},
    )


@given(st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False)), st.integers(0, 2**50))
def test_a_record_is_one_line_and_reads_back_equal(
    text: str, metrics: dict[str, float], at: int
) -> None:
    whole = Record(
        number=1,
        kind=Kind.NOTE,
        key=text,
        experiment=text,
        started_ms=at,
        time_ms=at,
        data={"tags": {text: text}, "metrics": metrics},
    )
    line = whole.line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Record.parse(line) == whole


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"null", b"3", b'{"n":1,"kind":"other"}', b'{"n": 1', b"\xff\xfe"]
)
def test_anything_else_is_not_a_record(line: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Record.parse(line)


def test_what_is_written_is_read_back(nasty_folder: Path) -> None:
    journal = Journal(nasty_folder, "host/1 ü")
    for number in range(1, 2001):
        journal.append(record(number, "x" * 1000))
    found, offset = [], 0
    while (chunk := journal.read(offset)).end > offset:
        found += chunk.records
        offset = chunk.end
    assert [r.number for r in found] == list(range(1, 2001))
    assert offset == journal.path.stat().st_size
    journal.close()


def test_a_line_longer_than_a_block_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "w")
    journal.append(record(1, "x" * 3_000_000))
    journal.append(record(2))
    first = journal.read(0)
    assert [r.number for r in first.records] == [1]
    assert [r.number for r in journal.read(first.end).records] == [2]
    journal.close()


def test_a_torn_last_line_is_left_and_a_damaged_one_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(record(1).line() + b'{"n": 2, "ki\n' + record(3).line() + b'{"n": 4')
    chunk = JournalFiles(path).read(0)
    assert [r.number for r in chunk.records] == [1, 3]
    assert chunk.torn == 1
    assert JournalFiles(path).read(chunk.end).end == chunk.end < path.stat().st_size


def test_a_record_after_a_full_disk_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, "w")
    journal.append(record(1))
    whole_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole_write(fd, data[:20]))
    with pytest.raises(OSError, match="only a part"):
        journal.append(record(2))
    monkeypatch.undo()
    journal.append(record(3))
    chunk = journal.read(0)
    assert [r.number for r in chunk.records] == [1, 3]
    assert chunk.torn == 1
    journal.close()


def test_the_offset_outlives_the_process_and_never_points_behind_the_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "w")
    journal.append(record(1))
    assert journal.offset() == 0
    journal.set_offset(10)
    assert JournalFiles(journal.path).offset() == 10
    journal.set_offset(10_000)
    assert journal.offset() == 0
    journal.shipped_file.write_text("half a num")
    assert journal.offset() == 0
    journal.close()


def test_only_the_journal_of_a_dead_writer_can_be_claimed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from sweeper.tracking.journal import Journal; from sweeper.tracking.records import *\n"
        "j = Journal(Path(sys.argv[1]), 'w')\n"
        "j.append(Record(number=1, kind=Kind.LOG, key='k', experiment='e', started_ms=1,\n"
        "                time_ms=1, data={}))\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), *sys.path], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"written\n"
        [path] = left_behind(tmp_path)
        with claimed(path) as journal:
            assert journal is None
        writer.kill()
        writer.wait()
    with claimed(path) as journal:
        assert journal is not None
        with claimed(path) as twice:
            assert twice is None
        journal.remove()
    assert left_behind(tmp_path) == []
    with claimed(path) as gone:
        assert gone is None


def test_without_locks_a_journal_is_left_alone_until_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some cluster file systems are mounted without ``flock``."""

    def unsupported(descriptor: int, flags: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    journal = Journal(tmp_path, "w")
    journal.append(record(1))
    with claimed(journal.path) as found:
        assert found is None
    old = time.time() - 4000
    os.utime(journal.path, (old, old))
    with claimed(journal.path) as found:
        assert found is not None
        assert [r.number for r in found.read(0).records] == [1]
    journal.close()


def test_a_closed_journal_takes_nothing_more(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "w")
    journal.append(record(1))
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.append(record(2))


def test_artifacts_stay_with_what_was_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("x")
    journal = Journal(tmp_path / "spool", "w")
    (tmp_path / "spool").mkdir()
    copy = tmp_path / "spool" / journal.keep_file(kept)
    journal.set_aside({"reason": "no"})
    journal.remove()
    assert copy.read_text() == "x"
    journal.rejected_file.unlink()
    journal.remove()
    assert not journal.files.exists()

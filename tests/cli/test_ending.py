"""How a process of ours ends: nothing that was begun is lost, and Python does not tidy up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

START = "import sys, threading, time, atexit\nfrom sweeper.cli.ending import end_process\n"


def ended(program: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START + program],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        **{"capture_output": True, "text": True, "timeout": 60, "check": False, **how},  # type: ignore[call-overload, no-any-return]
    )


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [("0", 0, ""), ("None", 0, ""), ("130", 130, ""), ("'no such thing'", 1, "no such thing\n")],
)
def test_the_code_is_the_one_that_python_would_give(asked: str, code: int, said: str) -> None:
    found = ended(f"end_process(SystemExit({asked}))")
    assert (found.returncode, found.stdout, found.stderr) == (code, "", said)


def test_threads_exit_functions_and_buffers_are_seen_to() -> None:
    found = ended(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def late():\n    time.sleep(0.5)\n    print('thread')\n"
        "atexit.register(print, 'exit function')\n"
        "threading.Thread(target=late).start()\n"
        "pool = ThreadPoolExecutor(1)\n"
        "pool.submit(print, 'pool').result()\n"  # whose thread waits for more
        "print('buffered', end='')\n"
        "end_process(SystemExit(0))"
    )
    assert found.stdout == "pool\nbufferedthread\nexit function\n"
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("asked", ["0", "1", "130", "'no'"])
def test_output_is_written_out_whatever_the_code(asked: str) -> None:
    found = ended(f"print('a result', end='')\nend_process(SystemExit({asked}))")
    assert found.stdout == "a result"


def test_a_signal_of_ours_ends_the_wait_and_keeps_the_code() -> None:
    """A worker's handler raises what is no Exception; exit functions are called all the same."""
    found = ended(
        "import signal\n"
        "class Now(BaseException): pass\n"
        "def stop(*_): raise Now\n"
        "signal.signal(signal.SIGALRM, stop)\nsignal.alarm(1)\n"
        "atexit.register(print, 'exit function')\n"
        "threading.Thread(target=time.sleep, args=(50,)).start()\n"
        "end_process(SystemExit(3))"
    )
    assert (found.returncode, found.stdout) == (3, "exit function\n")
    if sys.version_info < (3, 13):  # from then on Python itself says what came in between
        assert found.stderr == ""


def test_python_does_not_take_the_process_apart() -> None:
    found = ended(
        "class Held:\n    def __del__(self): print('collected')\n"
        "held = Held()\nend_process(SystemExit(0))"
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_a_reader_that_has_gone_is_no_news() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        found = ended(
            "print('x')\nend_process(SystemExit(0))",
            stdout=writing,
            stderr=subprocess.PIPE,
            capture_output=False,
        )
    finally:
        os.close(writing)
    assert (found.returncode, found.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        found = ended(
            "print('x')\nend_process(SystemExit(0))",
            stdout=full,
            stderr=subprocess.PIPE,
            capture_output=False,
        )
    assert found.returncode == 3
    assert found.stderr == "sweeper: the output must be written, but: No space left on device\n"


def test_ctrl_c_ends_the_wait_for_a_thread() -> None:
    program = (
        "import signal\n"  # a shell lets what it runs in the background ignore it
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threading.Thread(target=time.sleep, args=(50,)).start()\n"
        "print('waiting', flush=True)\nend_process(SystemExit(0))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", START + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    if sys.version_info < (3, 13):
        assert (process.returncode, said) == (130, "")
    else:  # Python itself ends the wait, says so, and goes on
        assert process.returncode == 0


def test_the_program_ends_so(tmp_path: Path) -> None:
    """Typed as a person does, with a mistake and without."""
    run = [sys.executable, "-m", "sweeper"]
    good = subprocess.run(
        [*run, "init", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert good.returncode == 0
    assert "Usage" in good.stdout
    bad = subprocess.run(
        [*run, "validate", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert bad.returncode == 2
    assert "must be readable" in bad.stderr


def test_a_result_reaches_a_pipe_with_any_code(tmp_path: Path) -> None:
    """``validate --json`` of a file with a mistake: code 2, and JSON that says where."""
    file = tmp_path / "bad.yaml"
    file.write_text("name: bad\nmodel: {name: mpl}\n")
    found = subprocess.run(
        [sys.executable, "-m", "sweeper", "validate", "--json", str(file)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 2
    assert json.loads(found.stdout)

"""How a process of ours ends: nothing that was begun is lost, and Python does not tidy up."""

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
    assert (process.returncode, said) == (130, "")


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

"""The end of a process of ours: what was begun is ended, and the memory is left to the system.

Python takes every module apart as it ends and looks for garbage in all of it: 2 s of a core with
torch and MLflow loaded, for a command and for each of its workers. `multiprocessing` ends its
processes in the way of this module.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any, Final, NoReturn, TextIO

from sweeper.errors import OutOfReachError

_FAILED: Final = 1
_INTERRUPTED: Final = 130


def end_process(asked: SystemExit) -> NoReturn:
    """End as ``asked``: threads are waited for, exit functions called, streams written out."""
    code = _number(asked.code)
    try:
        threading._shutdown()  # type: ignore[attr-defined] # as multiprocessing does
    except KeyboardInterrupt:  # somebody does not want to wait for a thread
        code = _INTERRUPTED
    except BaseException:  # noqa: BLE001 - a signal's handler of ours: nor does whoever sent it
        pass
    atexit._run_exitfuncs()
    failed = [_written_out(stream) for stream in (sys.stdout, sys.stderr)]
    os._exit(code or max(failed))


def _number(code: Any) -> int:
    """As Python reads what ``sys.exit`` is given."""
    if code is None or isinstance(code, int):
        return code or 0
    sys.stderr.write(f"{code}\n")
    return _FAILED


def _written_out(stream: TextIO | None) -> int:
    """Write out what is buffered; an exit code where that fails.

    A reader that is gone, as ``head`` is after ten lines, has what it wanted.
    """
    if stream is None or stream.closed:
        return 0
    try:
        stream.flush()
    except BrokenPipeError:
        return _FAILED
    except OSError as error:
        if stream is sys.stdout:
            os.write(2, f"sweeper: the output must be written, but: {error.strerror}\n".encode())
        return OutOfReachError.exit_code
    return 0

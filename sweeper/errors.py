"""Every error that sweeper raises on purpose.

::

    SweeperError                    exit code
    ├── UsageError                  2   what was typed cannot be done
    │   ├── StudyFileError          2   a study file has mistakes, each with its place
    │   ├── StudyChangedError       2   the study exists and was started from another file
    │   ├── StudyNotFoundError      2   the store has no study of that name
    │   ├── DataNotFoundError       2   a data set's files are missing or damaged
    │   └── MissingExtraError       2   an optional package is not installed
    ├── OutOfReachError             3   a server does not answer
    │   ├── StoreUnreachableError   3
    │   │   └── StoreRefusedError   3   waiting does not mend it: disk full, read-only
    │   └── TrackerUnreachableError 3
    ├── TrackerRefusedError         1   MLflow does not accept what was sent
    ├── WorkersFailedError          1   workers die as fast as they are started
    ├── TrialDivergedError          –   NaN or infinity: how one trial ends, never how sweeper does
    └── TrialLostError              –   the store gave the trial to another worker

The docstring of a class is its default message. Errors of other libraries are translated where
they enter, with ``raise … from``. Passwords in addresses are left out of every message.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from sweeper.private import redacted


class SweeperError(Exception):
    """sweeper could not go on."""

    exit_code = 1

    def __init__(self, message: str | None = None) -> None:
        default = inspect.cleandoc(type(self).__doc__ or "").splitlines()[0]
        super().__init__(redacted(message or default))


class UsageError(SweeperError):
    """What was asked for cannot be done."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """One mistake in a study file.

    ``line`` and ``column`` count from 1, as editors do; both are 0 for a value that came from the
    command line (``--set``), whose ``file`` is then ``--set``.
    """

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.path + ': ' if self.path else ''}{self.message}"


class StudyFileError(UsageError):
    """The study file has mistakes."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("\n".join(str(mistake) for mistake in mistakes))
        self.mistakes = tuple(mistakes)


class StudyChangedError(UsageError):
    """The study was started from a different file."""


class StudyNotFoundError(UsageError):
    """There is no study of this name in the store."""


class DataNotFoundError(UsageError):
    """The files of a data set are missing or damaged."""


class MissingExtraError(UsageError):
    """An optional package is needed and not installed."""


class OutOfReachError(SweeperError):
    """A server does not answer."""

    exit_code = 3


class StoreUnreachableError(OutOfReachError):
    """The store does not answer."""


class StoreRefusedError(StoreUnreachableError):
    """The store takes nothing, and waiting does not mend that."""


class TrackerUnreachableError(OutOfReachError):
    """The MLflow server does not answer."""


class TrackerRefusedError(SweeperError):
    """MLflow does not accept what was sent."""


class WorkersFailedError(SweeperError):
    """Workers die as fast as they are started."""


class TrialDivergedError(SweeperError):
    """The loss is no longer a finite number."""


class TrialLostError(SweeperError):
    """The store no longer counts this worker as the trial's owner."""

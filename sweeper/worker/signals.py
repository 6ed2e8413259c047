"""TERM and INT: once, the trial goes back in good order; twice, at once."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field


class StopNowError(BaseException):
    """A second signal: leave the epoch where it is."""


@dataclass(kw_only=True)
class Signals:
    """TERM and INT, counted; ``number`` is the last. ``install`` is for the main thread only."""

    count: int = 0
    number: int | None = field(default=None, init=False)
    _first: float | None = field(default=None, init=False)

    @property
    def stopping(self) -> bool:
        return self.count > 0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)

    def stop(self) -> None:
        """Stop as by a first signal."""
        self._first = self._first or time.monotonic()
        self.count = max(self.count, 1)

    def waited_s(self) -> float:
        """Seconds since the first signal; 0 before it."""
        return 0.0 if self._first is None else time.monotonic() - self._first

    def _received(self, number: int, _frame: object) -> None:
        self._first = self._first or time.monotonic()
        self.number = number
        self.count += 1
        if self.count > 1:
            raise StopNowError

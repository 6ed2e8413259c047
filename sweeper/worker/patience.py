"""Holding out while the store does not answer: back-off, jitter, and a word in the log."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from sweeper.errors import StoreRefusedError, StoreUnreachableError
from sweeper.worker.signals import Signals

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 15.0
GIVE_UP_S: Final = 3600.0

T = TypeVar("T")


def pause_s(failures: int) -> float:
    """How long to wait after so many failures in a row: ever longer, and never in step."""
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10))
    return longest * random.uniform(0.5, 1)


def patiently(
    call: Callable[[], T],
    what: str,
    signals: Signals,
    *,
    grace_s: float = 0.0,
    give_up_s: float = GIVE_UP_S,
) -> T:
    """What ``call`` returns, as soon as the store answers.

    Raises StoreUnreachableError after ``give_up_s``, or ``grace_s`` after a signal, and
    StoreRefusedError, which no waiting mends, at once.
    """
    began, failures = time.monotonic(), 0
    while True:
        try:
            result = call()
        except StoreRefusedError:
            raise
        except StoreUnreachableError as error:
            failures += 1
            if failures == 1:
                _log.warning("cannot %s yet, trying again: %s", what, error)
            if time.monotonic() - began > give_up_s:
                raise
            if signals.stopping and signals.waited_s() >= grace_s:
                raise
        else:
            if failures:
                away_s = time.monotonic() - began
                _log.info("the store answers again after %.0f s: %s", away_s, what)
            return result
        until = time.monotonic() + pause_s(failures)
        while time.monotonic() < until and not (signals.stopping and failures > 1):
            time.sleep(0.05)
        if signals.stopping:
            time.sleep(0.2)

"""How ``launch`` looks after a sweep: it hears Ctrl-C at once, whatever the store does.

A database that hangs, or a SQLite file that another program has locked, holds the call that asks
it. So the store is asked in a thread, and who waits can stop waiting.
"""

from __future__ import annotations

import logging
import math
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sweeper.errors import StoreUnreachableError

if TYPE_CHECKING:
    from sweeper.cli.view import View
    from sweeper.controller import Sweep
    from sweeper.store import Progress
    from sweeper.tracking import TrackingService

_log = logging.getLogger(__name__)
_LOOK_S: Final = 0.05
_POLL_S: Final = 0.5
_ANSWER_S: Final = 10.0
"""After so long without an answer the person who waits is told."""
_LAST_WORD_S: Final = 3.0
"""So long the store has to take down what a sweep that ends wants to tell it."""
_LEAVE_S: Final = 60.0
_LINGER_S: Final = 5.0
"""Then workers are told that all is over: one that waits for a place in a cluster cannot know."""
_LATE_S: Final = 15.0
"""Workers that are told to end have their grace, and so much to start up or wind down."""

T = TypeVar("T")


class Interrupts:
    """INT and TERM, counted, while the context lasts."""

    def __enter__(self) -> Interrupts:
        self.count = 0
        self._before = {
            number: signal.signal(number, self._received)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def more_than(self, count: int) -> bool:
        return self.count > count

    def _received(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(kw_only=True)
class _Answer:
    call: Callable[[], Any]
    taken: bool = False
    began: float = field(default_factory=time.monotonic)
    done: threading.Event = field(default_factory=threading.Event)
    value: Any = None
    error: BaseException | None = None


class Caller:
    """Calls functions in one thread of its own, one after the other."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._last = _Answer(call=lambda: None, taken=True)
        self._last.done.set()
        threading.Thread(target=self._run, name="store", daemon=True).start()

    def _run(self) -> None:
        while True:
            answer = self._calls.get()
            try:
                answer.value = answer.call()
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                answer.error = error
            answer.done.set()

    def ask(
        self,
        call: Callable[[], T],
        *,
        longest_s: float = math.inf,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> T:
        """What ``call`` returns or raises; StoreUnreachableError after ``longest_s`` or where
        ``interrupted()`` holds.

        A call that nobody waits for any more goes on to its end, and the next one waits for it:
        the seconds are those since the call began that is in the way. Who asks for the same once
        more gets that call's answer.
        """

        def wait(answer: _Answer) -> None:
            while not answer.done.wait(_LOOK_S):
                waited_s = time.monotonic() - answer.began
                if waited_s > longest_s or interrupted():
                    raise StoreUnreachableError(
                        f"the store must answer, but did not within {waited_s:.0f} s"
                    )

        answer = self._last
        if answer.call != call or answer.taken:
            wait(answer)
            self._last = answer = _Answer(call=call)
            self._calls.put(answer)
        wait(answer)
        answer.taken = True
        if answer.error is not None:
            raise answer.error
        return answer.value  # type: ignore[no-any-return]  # what call returned


def watch(
    sweep: Sweep,
    caller: Caller,
    interrupts: Interrupts,
    shown: View,
    service: TrackingService,
    *,
    until: float = math.inf,
    nearly_over: Callable[[], object] = lambda: None,
) -> None:
    """Look after the sweep until it is over, interrupted, or stopped from elsewhere.

    After ``until`` (monotonic seconds) it is left as after one interrupt. ``nearly_over`` is
    called once, when no trial waits for a worker any more.
    Raises what :meth:`Sweep.tick` raises; a store that is away is waited for as Outage says.
    """
    from sweeper.controller import Outage

    away = Outage()
    now: Progress | None = None
    stop_by, told = math.inf, False
    while True:
        note = service.look_after()
        handled = interrupts.count
        late = time.monotonic() > until
        if (handled or late) and not sweep.stopping:
            sweep.stop()
            stop_by = time.monotonic() + sweep.study.spec.faults.grace_s + _LATE_S
        answered = False
        try:
            now = caller.ask(
                sweep.start if now is None else sweep.tick,
                longest_s=_POLL_S if sweep.stopping else _ANSWER_S,
                interrupted=partial(interrupts.more_than, handled),
            )
            answered = True
            away.ended()
        except StoreUnreachableError as error:
            note = note if interrupts.count > handled else away.goes_on(error)
        if sweep.enough:
            note = f"no further trial is begun: {sweep.enough}"
        if sweep.stopping:
            again = "once more (Ctrl-C)" if handled else "Ctrl-C twice"
            note = f"stopping after the running epochs; {again} stops at once"
        alive = len(sweep.alive)
        if now is not None:
            shown.show(now, alive, note)
            if not (told or sweep.stopping or now.counts["waiting"]):
                told = True
                nearly_over()
        if interrupts.count > 1 or time.monotonic() > stop_by or (now is not None and now.over):
            return
        if not alive and (sweep.stopping or (answered and not sweep.pausing)):
            return
        if interrupts.count == handled:
            time.sleep(_POLL_S)


def leave(sweep: Sweep, caller: Caller) -> None:
    """Wait for workers that are about to end, and leave none behind."""
    from sweeper.store import progress

    def is_over() -> bool:
        return progress(sweep.store, sweep.study).over

    began = time.monotonic()
    try:
        over = caller.ask(is_over, longest_s=_LAST_WORD_S)
        while over and sweep.alive and (waited_s := time.monotonic() - began) < _LEAVE_S:
            if waited_s > _LINGER_S and not sweep.stopping:
                sweep.stop()
            time.sleep(0.1)
    except StoreUnreachableError as error:
        _log.debug("nobody knows whether the study is over: %s", error)
    finally:
        if sweep.alive:
            sweep.halt()
            try:
                caller.ask(sweep.give_back, longest_s=_LAST_WORD_S)
            except StoreUnreachableError as error:
                _log.warning("the trials of the workers that were ended count as lost: %s", error)


def say_interrupted(sweep: Sweep, caller: Caller) -> None:
    """Tell how far the study is, if the store can tell."""
    from sweeper.store import progress

    name = sweep.study.name
    try:
        now = caller.ask(lambda: progress(sweep.store, sweep.study), longest_s=_LAST_WORD_S)
    except StoreUnreachableError as error:
        sys.stderr.write(f"interrupted, and {error}; launch {name} again to go on\n")
        return
    sys.stderr.write(
        f"interrupted with {now.ended} of {now.budget} trials of {name} ended; "
        "launch it again to go on\n"
    )

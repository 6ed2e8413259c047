"""The controller: create or resume a study, keep its workers alive, look after its trials.

It holds nothing that the store does not: killed at any moment, another one goes on where it was.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from sqlalchemy.engine import make_url

from sweeper import checkpoints
from sweeper.address import host_of, refuse_tracking_uri
from sweeper.errors import (
    OutOfReachError,
    StoreRefusedError,
    StoreUnreachableError,
    StudyChangedError,
    SweeperError,
    UsageError,
    WorkersFailedError,
)
from sweeper.launchers import PYTHON, Job, Launcher, Process
from sweeper.settings import LAUNCHER_VARIABLE, Settings, login_variables, masked
from sweeper.store import (
    Control,
    Outcome,
    Progress,
    Store,
    StoredStudy,
    progress,
    recovery,
    studies,
    tickets,
)
from sweeper.store.enough import stop_if_enough
from sweeper.store.glance import failed_rows
from sweeper.study.diff import TRIALS, Change, changes
from sweeper.study.point import still_open, typed_point
from sweeper.study.spec import Grid, ReferenceOnly, StudySpec

_log = logging.getLogger(__name__)

_QUICK_DEATH_S: Final = 20.0
_QUICK_DEATHS: Final = 5
_LONGEST_PAUSE_S: Final = 60.0
_ALIKE: Final = 3
_STORE_AWAY_S: Final = 3600.0
_ERRORS: Final[dict[int, type[SweeperError]]] = {2: UsageError, 3: OutOfReachError}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A study with all its trials enqueued. ``new`` is False where it was there before."""

    study: StoredStudy
    new: bool
    enqueued: int


def prepare(
    store: Store, spec: StudySpec, *, with_reference: bool = False, extend: bool = False
) -> Prepared:
    """Create the study of ``spec`` or resume it, and enqueue what its budget lacks.

    Raises StudyChangedError where the study was started from a spec with other results, and
    lists what changed. ``extend`` allows more trials.
    """
    with store.exclusively():
        study = studies.create(store, spec)
        new = study is not None
        if study is None:
            known = studies.load(store, spec.name)
            _refuse(spec.name, changes(known.spec, spec), extend=extend)
            study = studies.update(store, spec)
        planned = tickets.tickets(spec, with_reference=with_reference)
        enqueued = tickets.fill(store, study.id, spec, planned)
        recovery.reconcile(store, study.id, spec)
        studies.ask(store, study.id, Control.RUN)
    return Prepared(study=study, new=new, enqueued=enqueued)


def refuse_if_changed(store: Store, specs: Sequence[StudySpec], *, extend: bool = False) -> None:
    """Raise as :func:`prepare` does where the store has one of the studies from another spec."""
    known = set(studies.names(store))
    for spec in specs:
        if spec.name in known:
            _refuse(spec.name, changes(studies.load(store, spec.name).spec, spec), extend=extend)


def extend(store: Store, name: str, more: int) -> StoredStudy:
    """Add ``more`` trials to the budget of a study that is there, and enqueue them.

    What its workers are asked for stays as it is. Raises UsageError where the space, or the list of
    published configurations, tells how many trials there are.
    """
    with store.exclusively():
        spec = studies.load(store, name).spec
        sampler = spec.search.sampler
        if isinstance(sampler, Grid | ReferenceOnly):
            raise UsageError(
                f"only a study whose sampler draws its trials can be given more of them, but that "
                f"of {name!r} is {sampler.name!r}; start a study of another name"
            )
        trials = (spec.search.trials or 1) + more
        search = spec.search.model_copy(update={"trials": trials})
        study = studies.update(store, spec.model_copy(update={"search": search}))
        tickets.fill(store, study.id, study.spec, tickets.tickets(study.spec, with_reference=False))
    return study


@dataclass(frozen=True, kw_only=True, slots=True)
class Enqueued:
    """A trial of ``study`` that a person asked for: its number, its values by path, and the paths
    that are the sampler's to choose."""

    study: StoredStudy
    number: int
    values: Mapping[str, Any]
    open: Sequence[str]


def enqueue(store: Store, name: str, words: Sequence[str]) -> Enqueued:
    """Add a trial with values of a person's choice (``path=value``) to a study that is there.

    It is taken before those that the sampler is to choose. What its workers are asked for stays as
    it is. Raises UsageError where the study can have no such trial, or has it.
    """
    with store.exclusively():
        study = studies.load(store, name)
        spec = study.spec
        point = typed_point(spec, words)
        left = still_open(spec, point)
        sampler = spec.search.sampler
        if left and isinstance(sampler, Grid | ReferenceOnly):
            raise UsageError(
                f"the sampler of {name!r} is {sampler.name!r}, which chooses nothing; give "
                + ", ".join(left)
            )
        if not left and tickets.known(store, study.id, spec, point):
            raise UsageError(f"the study {name!r} has a trial of these values already")
        number = tickets.enqueue(store, study.id, spec, point)
    return Enqueued(study=study, number=number, values=point, open=left)


def _refuse(name: str, found: Sequence[Change], *, extend: bool) -> None:
    """Raise where one of the changes would mix two studies in one."""
    grave = [change for change in found if not change.harmless]
    if not grave or (extend and all(change.extends for change in grave)):
        return
    listing = "\n".join(f"  {change}" for change in grave)
    if all(change.extends for change in grave):
        advice = "run it again with --extend to add to its budget"
    elif all(change.path == TRIALS for change in grave):
        advice = f"a budget does not shrink; go on with the one it has: --trials {grave[0].old}"
    else:
        advice = f"give the study a new name (--set name={name}-2), or undo the change"
    raise StudyChangedError(
        f"the study {name!r} in the store must be the one in the file, but the file differs:\n"
        f"{listing}\n{advice}"
    )


class Outage:
    """How long the store has been away, and whether that is still to be borne."""

    def __init__(self) -> None:
        self._since: float | None = None

    def goes_on(self, error: StoreUnreachableError) -> str:
        """A line for the person who waits.

        Raises ``error`` where no waiting mends it, or after an hour: then the workers have given
        up too.
        """
        if self._since is None:
            self._since = time.monotonic()
        away_s = time.monotonic() - self._since
        if isinstance(error, StoreRefusedError) or away_s > _STORE_AWAY_S:
            raise error
        return f"trials go on without the store: {error}"

    def ended(self) -> None:
        """The store has answered."""
        self._since = None


@dataclass(kw_only=True)
class QuickDeaths:
    """Counts workers that die within seconds of their start, to tell a fault from an accident.

    Workers that die together died of one thing, a person with ``kill`` or a node that went down:
    of all that were there when a death was counted, no other counts. So the count is of starts
    that came to nothing, one after the other, whatever ended them (the kernel's out-of-memory
    killer looks like a person). Every worker that ends well or later starts the count anew.
    """

    count: int = 0
    _known: set[str] = field(default_factory=set)
    _not_before: float = 0.0

    def saw(self, process: Process, others: Sequence[Process]) -> None:
        """Take note of a worker that ended; ``others`` are all that were ever started."""
        if process.exit_code == 0 or process.lived_s >= _QUICK_DEATH_S:
            self.count, self._not_before = 0, 0.0
        elif process.name not in self._known:
            self.count += 1
            self._known = {each.name for each in others}
            pause_s = 0.0 if self.count == 1 else min(_LONGEST_PAUSE_S, 2.0 ** (self.count - 2))
            self._not_before = time.monotonic() + pause_s

    @property
    def pausing(self) -> bool:
        """Whether the next start is to wait: one that failed is not repeated without a pause."""
        return time.monotonic() < self._not_before

    def hopeless(self, alive: Sequence[Process]) -> bool:
        """Whether workers die as fast as they are started, and none has lived for a while."""
        lasting = any(process.lived_s >= _QUICK_DEATH_S for process in alive)
        return self.count >= _QUICK_DEATHS and not lasting


@dataclass(kw_only=True)
class Sweep:
    """A study and the workers that this process keeps for it.

    ``allow_imports``: the workers may import models that the study names. Only for a study that
    came from a file of the person who started this, not out of the store. ``enough`` says why no
    further trial is begun, where the study has what its file calls enough.

    Call :meth:`start` once, :meth:`tick` every second or so until it says that the sweep is over.
    """

    store: Store
    settings: Settings
    study: StoredStudy
    launcher: Launcher
    workers: int
    environment: dict[str, str] = field(default_factory=dict)
    allow_imports: bool = False
    stopping: bool = False
    enough: str = field(default="", init=False)
    _buried: set[str] = field(default_factory=set)
    _deaths: QuickDeaths = field(default_factory=QuickDeaths)
    _hands: threading.Lock = field(default_factory=threading.Lock, init=False)
    _looked: float = 0.0
    _seen: Progress | None = None
    _lookout: recovery.Lookout = field(init=False)

    def __post_init__(self) -> None:
        self._lookout = recovery.Lookout(self.study.spec.faults)

    @property
    def job(self) -> Job:
        """The command line of one worker. Only one on this machine can end with this process."""
        tied = [] if self.launcher.elsewhere else ["--tied"]
        allowed = ["--allow-imports"] if self.allow_imports else []
        return Job(
            argv=[PYTHON, "-m", "sweeper", "worker", self.study.name, *tied, *allowed],
            environment={
                **login_variables(),
                **self.settings.environment(),
                LAUNCHER_VARIABLE: self.launcher.name,
                **self.environment,
            },
            gpus=self.study.spec.resources.gpus_per_worker,
            logs=self.settings.logs(self.study.name),
            forks=True,
        )

    def start(self) -> Progress:
        """Start as many workers as there is work for, beside those of an earlier launch."""
        self._seen = now = progress(self.store, self.study)
        self.enough = stop_if_enough(self.store, self.study, now)
        missing = min(self.workers, now.budget - now.ended) - len(self.alive)
        if missing > 0 and not self.enough:
            self._add(missing)
        return now

    def _add(self, count: int) -> None:
        """Start more workers, unless the sweep was stopped meanwhile from another thread."""
        with self._hands:
            if not self.stopping:
                self.launcher.start(self.job, count)

    @property
    def alive(self) -> list[Process]:
        return [process for process in self.launcher.processes() if process.exit_code is None]

    def tick(self) -> Progress:
        """Look once: bury dead workers, requeue lost trials, replace who is missing.

        What it returns has the trials that ended since the look before as ``news``.

        Raises:
            UsageError: a worker found that no trial can run (data, packages).
            OutOfReachError: a worker cannot reach the store.
            WorkersFailedError: workers die at once, or all first trials crash alike.
        """
        for process in self.launcher.processes():
            if process.exit_code is not None and process.name not in self._buried:
                self._bury(process)
        lost_after_s = self.study.spec.faults.lost_after_s
        if time.monotonic() - self._looked > min(10.0, lost_after_s / 3):
            self._looked = time.monotonic()
            self._lookout.reap(self.store, self.study.id)
        now = progress(self.store, self.study, since=self._seen)
        if now.due:
            with self.store.exclusively():
                recovery.reconcile(self.store, self.study.id, self.study.spec)
            now = progress(self.store, self.study, since=self._seen)
        self._seen = now
        stop_if_all_alike(self.store, self.study, now)
        self.enough = stop_if_enough(self.store, self.study, now)
        if not self.stopping and not now.over:
            work = now.budget - now.ended
            missing = min(self.workers, work) - len(self.alive)
            if missing > 0 and not self._deaths.pausing and self._control is Control.RUN:
                self._add(missing)
        return now

    @property
    def _control(self) -> Control:
        return studies.control(self.store, self.study.id)

    def _bury(self, process: Process) -> None:
        """Requeue what a dead worker had, and stop the sweep where the next would die too."""
        lost = recovery.lose_trials_of(self.store, self.study.id, process.name)
        self._buried.add(process.name)
        if lost:
            _log.warning("worker %s died with trial %s", process.name, lost)
            with self.store.exclusively():
                recovery.reconcile(self.store, self.study.id, self.study.spec)
        if self.stopping:
            return
        processes = self.launcher.processes()
        self._deaths.saw(process, processes)
        if process.exit_code == 0:
            return
        said = self.launcher.log(process.name)
        if kind := _ERRORS.get(process.exit_code or 0):
            raise kind(said.rpartition("sweeper: ")[2].strip())
        _log.warning(
            "worker %s ended with %d; see %s", *(process.name, process.exit_code, process.log)
        )
        if self._deaths.hopeless(self.alive):
            raise WorkersFailedError(
                f"workers started {_QUICK_DEATHS} times in a row died within "
                f"{_QUICK_DEATH_S:.0f} s, the last with exit code {process.exit_code}. The end of "
                f"its log ({process.log}):\n{said}"
            )

    def clean_up(self) -> None:
        """Remove the checkpoints that the trials of a study that is over left behind."""
        checkpoints.remove_study(self.settings.checkpoints, self.study.identity)

    def stop(self, *, now: bool = False) -> None:
        """End the workers: after their epoch, or at once. Their trials go back to the queue."""
        with self._hands:
            self.stopping = True
            self.launcher.stop(now=now)
        if now:
            try:
                self.give_back()
            except StoreUnreachableError as error:
                _log.warning("the trials of the workers that were ended count as lost: %s", error)

    def halt(self) -> None:
        """End the workers at once, without a word to the store."""
        with self._hands:
            self.stopping = True
            self.launcher.stop(now=True)

    def give_back(self) -> None:
        """Put the trials of workers that were ended on purpose back into the queue."""
        for process in self.launcher.processes():
            recovery.return_trials_of(self.store, self.study.id, process.name)

    @property
    def pausing(self) -> bool:
        """Whether workers are missing because the last ones died at their start."""
        return self._deaths.pausing


def refuse_if_out_of_reach(settings: Settings, launcher: Launcher) -> None:
    """Raise UsageError where workers, those on other machines above all, could not use
    ``settings``.
    """
    refuse_tracking_uri(settings.tracking_uri)
    if not launcher.elsewhere:
        return
    store = make_url(settings.store_url)
    if store.get_backend_name() == "sqlite" or _is_this_machine(host_of(store)):
        raise UsageError(
            f"workers that {launcher.name} starts must reach the store from other machines, but "
            f"{masked(settings.store_url)} is on this machine alone; "
            "give --store postgresql+psycopg://user@host/database"
        )
    uri = settings.tracking_uri
    if uri is None or not uri.startswith("http") or _is_this_machine(urlsplit(uri).hostname):
        found = f"MLFLOW_TRACKING_URI is {masked(uri)}" if uri else "MLFLOW_TRACKING_URI is not set"
        raise UsageError(
            f"workers that {launcher.name} starts must reach MLflow from other machines, but "
            f"{found}, which serves this machine alone; "
            "start a server and set MLFLOW_TRACKING_URI=http://host:port"
        )


def _is_this_machine(host: str | None) -> bool:
    if not host or host == "localhost" or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def stop_if_all_alike(store: Store, study: StoredStudy, now: Progress) -> None:
    """Raise WorkersFailedError where the first trials all failed with one message.

    The rest would fail as well.
    """
    if now.counts["complete"] or now.counts["pruned"] or now.ended < _ALIKE:
        return
    ended = failed_rows(store, study)
    if any(row.outcome not in {Outcome.CRASHED, Outcome.INVALID} for row in ended):
        return
    reasons = Counter(((row.error or "").strip().splitlines() or [""])[-1] for row in ended)
    count = max(reasons.values(), default=0)
    if count >= _ALIKE and count == len(ended):
        where = "\n".join((ended[0].error or "").strip().splitlines()[-5:])
        raise WorkersFailedError(
            f"the first {count} trials of {now.spec.name!r} all failed in the same way:\n"
            f"{where}\nThe study is stopped. Put that right, then: "
            f"sweeper retry {now.spec.name}"
        )

"""Studies in a store: create or resume one, read it, ask its workers for something."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import optuna
from optuna.exceptions import DuplicatedStudyError
from pydantic import ValidationError

from sweeper.errors import StudyNotFoundError, UsageError
from sweeper.settings import Owner
from sweeper.store import attributes as attr
from sweeper.store import sampling
from sweeper.store.attributes import Control
from sweeper.store.database import Store
from sweeper.store.refusals import reaching
from sweeper.study.spec import StudySpec
from sweeper.study.suggest import did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredStudy:
    """A study of the store: Optuna's, with the spec it was started from."""

    study: optuna.Study
    spec: StudySpec

    @property
    def id(self) -> int:
        return int(self.study._study_id)

    @property
    def name(self) -> str:
        return str(self.study.study_name)

    @property
    def identity(self) -> str:
        """A name that no other study has, not even a later one of the same name. Asks the store.

        Raises StudyNotFoundError where it was deleted.
        """
        return self.owner.identity

    @property
    def owner(self) -> Owner:
        """How the tracker tells this study's runs from another's of its name; as above."""
        with _there():
            created = self.study.user_attrs.get(attr.CREATED)
        known = self.id if created is None else created
        digest = hashlib.sha256(f"{self.name} {known!r}".encode()).hexdigest()
        return Owner(identity=f"{self.name}-{digest[:8]}", since_ms=(created or 0.0) * 1000)


@contextlib.contextmanager
def _there() -> Iterator[None]:
    """Optuna knows no study of an id any more: somebody has deleted it, with Optuna's tools."""
    try:
        yield
    except KeyError as error:
        raise StudyNotFoundError("the study was deleted from the store") from error


def names(store: Store) -> list[str]:
    """The names of all studies that sweeper started, oldest first."""
    with reaching(store.url):
        return [
            summary.study_name
            for summary in store.storage.get_all_studies()
            if attr.SPEC in summary.user_attrs
        ]


def create(store: Store, spec: StudySpec) -> StoredStudy | None:
    """Create the study of ``spec``, or None where one of this name is there already.

    What a crash left half created is completed. Call it under :meth:`Store.exclusively`.
    """
    with reaching(store.url):
        try:
            study = optuna.create_study(
                study_name=spec.name,
                storage=store.storage,
                directions=[objective.direction for objective in spec.objective],
            )
            study.set_user_attr(attr.CREATED, time.time())
        except DuplicatedStudyError:
            study = optuna.load_study(study_name=spec.name, storage=store.storage)
            if attr.SPEC in study.user_attrs or attr.CREATED not in study.user_attrs:
                return None
        study.set_user_attr(attr.CONTROL, str(Control.RUN))
        study.set_user_attr(attr.SPEC, spec.stored())  # last: without it the study is nobody's
    return load(store, spec.name)


def load(store: Store, name: str) -> StoredStudy:
    """The study called ``name``.

    Raises:
        StudyNotFoundError: there is none; the message names those there are.
        UsageError: a study of that name is there, but sweeper did not start it.
    """
    with reaching(store.url):
        try:
            study = optuna.load_study(
                study_name=name, storage=store.storage, sampler=optuna.samplers.RandomSampler()
            )
        except KeyError as error:
            known = names(store)
            raise StudyNotFoundError(
                f"the store must have a study called {name!r}, but it has "
                + (", ".join(known) or "none")
                + did_you_mean(name, known)
            ) from error
        stored = study.user_attrs.get(attr.SPEC)
    if stored is None:
        raise UsageError(
            f"the study {name!r} was started by something other than sweeper; "
            "choose another name with --set name=…"
        )
    spec = _spec(name, stored)
    study.pruner = sampling.pruner(spec)
    return StoredStudy(study=study, spec=spec)


def load_by_id(store: Store, study_id: int) -> StoredStudy:
    """The study with this id; errors as in :func:`load`."""
    with reaching(store.url), _there():
        name = store.storage.get_study_name_from_id(study_id)
    return load(store, name)


def _spec(name: str, stored: str) -> StudySpec:
    """The spec that the store holds under ``name``, which names files and is thus checked again.

    Raises UsageError where it is none, or that of another study.
    """
    try:
        spec = StudySpec.model_validate_json(stored)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        raise UsageError(
            f"the study {name!r} in the store must be one that this version of sweeper can read, "
            f"but {'.'.join(map(str, found['loc']))}: {found['msg']}"
        ) from error
    if spec.name != name:
        raise UsageError(
            f"the study {name!r} in the store must have a spec of that name, but it is of "
            f"{spec.name!r}; somebody has changed one of them by hand"
        )
    return spec


def update(store: Store, spec: StudySpec) -> StoredStudy:
    """Store ``spec`` in place of the one that the study was started from."""
    with reaching(store.url):
        study = load(store, spec.name).study
        study.set_user_attr(attr.SPEC, spec.stored())
    return load(store, spec.name)


def control(store: Store, study_id: int) -> Control:
    """What the study's workers are asked to do. Raises StudyNotFoundError, as all below do."""
    with reaching(store.url), _there():
        asked = store.storage.get_study_user_attrs(study_id).get(attr.CONTROL, Control.RUN)
    return Control(asked)


def asked(store: Store, study_id: int) -> tuple[Control, str]:
    """As :func:`control`, and why; empty where a person asked for it."""
    with reaching(store.url), _there():
        known = store.storage.get_study_user_attrs(study_id)
    return Control(known.get(attr.CONTROL, Control.RUN)), str(known.get(attr.STOPPED, ""))


def finished(store: Store, study_id: int, counts: Mapping[str, int]) -> bool:
    """Whether the study was finished as it stands: with these ``counts`` by state."""
    with reaching(store.url), _there():
        known = store.storage.get_study_user_attrs(study_id).get(attr.FINISHED)
    return bool(known == dict(counts))


def remember_finished(store: Store, study_id: int, counts: Mapping[str, int]) -> None:
    """Store that report and tracker have the study as it stands."""
    with reaching(store.url), _there():
        store.storage.set_study_user_attr(study_id, attr.FINISHED, dict(counts))


def ask(store: Store, study_id: int, what: Control, *, why: str = "") -> None:
    """Ask the study's workers for something; they look at least once a heartbeat.

    ``why`` is shown by ``sweeper status`` until something else is asked for.
    """
    with reaching(store.url), _there():
        if store.storage.get_study_user_attrs(study_id).get(attr.STOPPED, "") != why:
            store.storage.set_study_user_attr(study_id, attr.STOPPED, why)
        store.storage.set_study_user_attr(study_id, attr.CONTROL, str(what))

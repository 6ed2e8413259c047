"""A study file → :class:`StudySpec`, or every mistake in it, each with its place.

Four readings, each of what the one before left intact: YAML (`source`), ``--set`` laid over it
(`overrides`), the types of all fields (`draft`), and what fields mean together (`parameters`,
`rules`, `combinations`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from sweeper.errors import Mistake, StudyFileError
from sweeper.study import source
from sweeper.study.combinations import combination_mistakes
from sweeper.study.describe import shown
from sweeper.study.draft import draft
from sweeper.study.messages import Finding, place_of, spelled
from sweeper.study.nodes import Node
from sweeper.study.overrides import overridden
from sweeper.study.parameters import parameter_mistakes
from sweeper.study.rules import rule_mistakes
from sweeper.study.spec import StudySpec

TEXT = "<text>"
"""What a text that is in no file is called in messages."""


def load(file: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """The spec of a study file, with ``overrides`` (``path=value``) laid over it.

    Raises StudyFileError with every mistake, sorted by place.
    """
    return _one(_read(file, overrides))


def check(file: Path, overrides: Sequence[str] = ()) -> list[Mistake]:
    """Every mistake in a study file, sorted by place; [] for a file that :func:`load` loads."""
    return _read(file, overrides)[1]


def loads(text: str, overrides: Sequence[str] = (), *, file: str = TEXT) -> StudySpec:
    """As :func:`load`, of a text at hand. ``file`` is its name in messages."""
    return _one(_examined(text, file, overrides))


def _one(found: tuple[StudySpec | None, list[Mistake]]) -> StudySpec:
    spec, mistakes = found
    if spec is None or mistakes:
        raise StudyFileError(mistakes)
    return spec


def _read(file: Path, overrides: Sequence[str]) -> tuple[StudySpec | None, list[Mistake]]:
    try:
        text = source.read(file)
    except StudyFileError as error:
        return None, list(error.mistakes)
    return _examined(text, str(file), overrides)


def _examined(
    text: str, file: str, overrides: Sequence[str]
) -> tuple[StudySpec | None, list[Mistake]]:
    root, mistakes = source.compose(text, file)
    if root is None:
        return None, mistakes
    if not isinstance(root.value, dict):
        found = "it is empty" if root.value is None else f"it holds {shown(root.data)}"
        message = (
            f"a study file must be a mapping with name, data and model, but {found}; "
            f"'sweeper init' writes one to start from"
        )
        return None, mistakes or [_mistake(root, Finding(path=(), message=message))]
    root, wrong = overridden(root, overrides)
    # What the YAML reading refused stands as null in the tree: no second word about it.
    reported = {(mistake.line, mistake.column) for mistake in mistakes}
    spec, findings = _understood(root)
    later = [_mistake(root, finding) for finding in findings]
    mistakes += [each for each in later if (each.line, each.column) not in reported]
    mistakes += wrong
    mistakes.sort(key=lambda each: (each.line, each.column, each.path, each.message))
    return spec, list(dict.fromkeys(mistakes))


def _understood(root: Node) -> tuple[StudySpec, list[Finding]]:
    """The spec of ``root``, and what is wrong; a later check leaves out what an earlier refused."""
    read, found = draft(root)
    for checked in (parameter_mistakes, rule_mistakes, combination_mistakes):
        more = list(itertools.islice(checked(read), source.MAX_MISTAKES))
        read = read.without(more)
        found = [*found, *more]
    return read.spec, found


def _mistake(root: Node, finding: Finding) -> Mistake:
    place, path = place_of(root, finding)
    if not place.override and (node := root.find(path)) is not None:
        # A mapping of the file in which the command line set something is to blame for that.
        place = next((each for each in node.keys.values() if each.override), place)
    message = finding.message + (f" (--set {place.override})" if place.override else "")
    return Mistake(
        file=place.file, line=place.line, column=place.column, path=spelled(path), message=message
    )

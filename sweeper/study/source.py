"""YAML text → plain data in which every key and value knows its line and column.

The syntax is PyYAML's; what a plain scalar means is YAML 1.2's core schema: ``1e-4`` is a number,
``on`` and ``yes`` are text, ``010`` is ten, and a date is text. Nothing is executed, tags are
refused, and size, depth and what aliases expand to are bounded, so that no file takes long.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from sweeper.errors import Mistake, StudyFileError
from sweeper.study.nodes import Node, Place, scalar
from sweeper.study.syntax import explained

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 20
MAX_NODES: Final = 50_000
MAX_WHOLE: Final = 2**63
MAX_MISTAKES: Final = 200
"""So many mistakes are looked for; nobody reads more."""

# What YAML allows, less the line ends that editors do not count as such.
_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
_WHOLE = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: Final = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def read(file: Path) -> str:
    """The text of a study file.

    Raises StudyFileError where it is not there, too large, or not UTF-8.
    """

    def mistake(message: str, line: int = 0, column: int = 0) -> StudyFileError:
        return StudyFileError(
            [Mistake(file=str(file), line=line, column=column, path="", message=message)]
        )

    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise mistake(f"the study file must be readable, but: {reason}") from error
    if len(content) > MAX_BYTES:
        raise mistake(f"a study file must have at most {MAX_BYTES // 1024} KiB; this one has more")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise mistake("the file must be UTF-8, but it is UTF-16; save it as UTF-8", 1, 1)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Offsets count from behind the byte order mark, where there is one.
        good = error.object[: error.start].decode("utf-8").removeprefix("\ufeff")
        raise mistake(
            f"the file must be UTF-8, but has the byte 0x{error.object[error.start]:02x}; "
            f"save it as UTF-8",
            *_line_and_column(good, len(good)),
        ) from error


def _line_and_column(text: str, index: int) -> tuple[int, int]:
    before = text[:index].replace("\r\n", "\n").replace("\r", "\n")
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def compose(text: str, file: str) -> tuple[Node | None, list[Mistake]]:
    """The tree of the one document in ``text`` (None where it cannot be had), and the mistakes.

    Never raises for anything that ``text`` may hold.
    """
    if found := _FORBIDDEN.search(text):
        line, column = _line_and_column(text, found.start())
        message = f"the file must be plain text, but has {_character(found.group())} here"
        return None, [Mistake(file=file, line=line, column=column, path="", message=message)]
    composer = _Composer(file)
    loader = yaml.SafeLoader(text)
    try:
        while composer.going and loader.check_event():
            event: yaml.Event = loader.get_event()  # type: ignore[no-untyped-call]  # untyped stub
            composer.take(event)
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError) as error:
        # PyYAML lets int() and chr() fail on what it has scanned, as in "\U99999999".
        line, column, message = explained(error, (loader.line + 1, loader.column + 1))
        composer.note(Place(file=file, line=line, column=column), message)
        composer.root = None
    finally:
        loader.dispose()
    if composer.root is None and not composer.mistakes:
        place = Place(file=file, line=1, column=1)
        composer.root = scalar(None, place)
    return composer.root, composer.mistakes


def _character(character: str) -> str:
    name = unicodedata.name(character, "a control character").lower()
    return f"the character U+{ord(character):04X} ({name})"


@dataclass(kw_only=True, slots=True)
class _Open:
    """A collection that is being read."""

    place: Place
    anchor: str | None
    is_mapping: bool
    items: dict[str, Node]
    keys: dict[str, Place]
    elements: list[Node]
    key: tuple[str | None, Place] | None = None
    size: int = 1
    height: int = 1


class _Composer:
    """Builds the tree from PyYAML's events, one at a time, without recursion."""

    def __init__(self, file: str) -> None:
        self.going = True
        self.root: Node | None = None
        self.mistakes: list[Mistake] = []
        self._file = file
        self._open: list[_Open] = []
        self._documents = 0
        self._nodes = 0
        self._anchors: dict[str, tuple[Node, int, int]] = {}  # with size and height

    def note(self, place: Place, message: str) -> None:
        if len(self.mistakes) >= MAX_MISTAKES:
            self.root, self.going = None, False
            return
        self.mistakes.append(
            Mistake(file=self._file, line=place.line, column=place.column, path="", message=message)
        )

    def _stop(self, place: Place, message: str) -> None:
        self.note(place, message)
        self.root, self.going = None, False

    def take(self, event: yaml.Event) -> None:
        mark = event.start_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        place = Place(file=self._file, line=line, column=column)
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    self._stop(place, "a study file must hold one document; remove this '---'")
            case yaml.AliasEvent():
                self._alias(event.anchor or "", place)
            case yaml.ScalarEvent():
                self._check_tag(event.tag, place)
                self._scalar(event, place)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._check_tag(event.tag, place)
                is_mapping = isinstance(event, yaml.MappingStartEvent)
                self._open.append(
                    _Open(
                        place=place,
                        anchor=event.anchor,
                        is_mapping=is_mapping,
                        items={},
                        keys={},
                        elements=[],
                    )
                )
                if len(self._open) > MAX_DEPTH:
                    self._stop(place, f"values must be nested at most {MAX_DEPTH} deep")
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self._close()

    def _check_tag(self, tag: str | None, place: Place) -> None:
        if tag is not None:
            self.note(place, "tags such as !!int have no place in a study file; remove it")

    def _alias(self, name: str, place: Place) -> None:
        if name not in self._anchors:
            inside = any(each.anchor == name for each in self._open)
            why = "its own value is not finished here" if inside else "there is none above"
            self.note(place, f"*{name} must repeat an earlier &{name}, but {why}")
            self._add(scalar(None, place), name, 1, 0)
            return
        node, size, height = self._anchors[name]
        if len(self._open) + height > MAX_DEPTH:
            self._stop(place, f"values must be nested at most {MAX_DEPTH} deep, aliases included")
            return
        # The value keeps the places of its own parts; the whole of it is where the alias stands.
        self._nodes += size - 1
        self._add(replace(node, place=place), name, size, height)

    def _scalar(self, event: yaml.ScalarEvent, place: Place) -> None:
        plain = event.style is None
        if plain and _NOT_FINITE.fullmatch(event.value):
            self.note(place, f"a number must be finite, but got {event.value}")
            value: Any = None
        else:
            value = resolved(event.value) if plain else event.value
        if isinstance(value, int) and not -MAX_WHOLE <= value < MAX_WHOLE:
            self.note(place, "a whole number must fit into 64 bits, but this one does not")
            value = None
        elif isinstance(value, float) and not math.isfinite(value):
            self.note(place, f"a number must be finite, but {event.value[:40]} is too large")
            value = None
        elif isinstance(value, str) and (found := _unfit(value)):
            self.note(place, f"text must be printable, but has {_character(found)} in it")
            value = ""
        node = scalar(value, place)
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, 1, 0)
        self._add(node, event.value if plain else None, 1, 0)

    def _close(self) -> None:
        done = self._open.pop()
        value = done.items if done.is_mapping else tuple(done.elements)
        node = Node(place=done.place, value=value, keys=done.keys)
        if done.anchor is not None:
            self._anchors[done.anchor] = (node, done.size, done.height)
        self._add(node, None, done.size, done.height)

    def _add(self, node: Node, written: str | None, size: int, height: int) -> None:
        """Put a finished node where it belongs. ``written``: how a plain scalar reads."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._stop(node.place, f"a study file must have at most {MAX_NODES:,} values")
            return
        if not self._open:
            self.root = node
            return
        inside = self._open[-1]
        inside.size += size
        inside.height = max(inside.height, height + 1)
        if not inside.is_mapping:
            inside.elements.append(node)
        elif inside.key is None:
            inside.key = (self._key(node, written), node.place)
        else:
            (key, place), inside.key = inside.key, None
            if key is None:
                return
            if key in inside.items:
                first = inside.keys[key]
                self.note(
                    place,
                    f"a key must be given once, but {key!r} is there already "
                    f"(line {first.line}); remove one of them",
                )
                return
            inside.items[key], inside.keys[key] = node, place

    def _key(self, node: Node, written: str | None) -> str | None:
        if written == "<<":
            self.note(node.place, "<< (merging) is not part of YAML 1.2; write the fields out")
            return None
        if isinstance(node.value, str):
            return node.value
        if written is not None and not isinstance(node.value, Mapping | tuple):
            self.note(node.place, f"a key must be text, but got {written}; put it in quotes")
        else:
            self.note(node.place, "a key must be text, but got a list or a mapping")
        return None


def resolved(text: str) -> bool | int | float | str | None:
    """What a plain scalar stands for in YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text) if len(text) <= 40 else 10**40
    if _BASED.fullmatch(text):
        return int(text, 0) if len(text) <= 40 else 10**40
    if _REAL.fullmatch(text):
        return float(text)
    return text


def _unfit(text: str) -> str | None:
    """The first character of ``text`` that no name or description may have."""
    return next(
        (
            character
            for character in text
            if unicodedata.category(character) in {"Cc", "Cs"} and character not in "\n\t"
        ),
        None,
    )

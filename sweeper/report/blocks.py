"""What a page is made of: sections of blocks, which the template draws.

Plain text throughout: the template escapes it. Only :class:`Figure` and :class:`Picture` hold
what a browser interprets, and both are made here from numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sweeper.report.tables import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A paragraph. ``problem`` marks what is missing and why."""

    text: str
    problem: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """A table, folded where ``summary`` names it."""

    table: Table
    summary: str = ""
    kind: Literal["table"] = "table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A Plotly figure as plain data. Narrower than ``least_width_px`` it scrolls."""

    name: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    height_px: int = 340
    least_width_px: int = 0
    wide: bool = False
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """An entry of a legend: clicking it hides its lines in every figure of the group."""

    key: str
    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """Figures over the epochs that share one legend and one log switch."""

    name: str
    legend: tuple[Line, ...]
    figures: tuple[Figure, ...]
    caption: str = ""
    kind: Literal["curves"] = "curves"


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A small picture, drawn ``scale`` times as large with hard pixels."""

    source: str
    alt: str
    width_px: int
    height_px: int
    caption: str = ""
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Pictures side by side under a title."""

    title: str
    caption: str
    pictures: tuple[Picture, ...]
    small: bool = False
    kind: Literal["gallery"] = "gallery"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names and values; a value is one line or several."""

    title: str
    facts: tuple[tuple[str, tuple[str, ...]], ...]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Folded:
    """Long text behind one line."""

    summary: str
    text: str
    kind: Literal["folded"] = "folded"


Block = Text | Tables | Figure | Curves | Gallery | Facts | Folded


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page. ``name`` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A number that is read first."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A whole report. ``headline`` is what came out, in one sentence."""

    title: str
    subtitle: str
    headline: str
    tiles: tuple[Tile, ...]
    first: tuple[Block, ...]
    sections: tuple[Section, ...]
    links: tuple[tuple[str, str], ...] = ()
    footer: str = ""

"""The tree of a study file: plain values, each with the place where it was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where something was written; ``override`` is the ``--set`` it came from, if any."""

    file: str
    line: int
    column: int
    override: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One value: a mapping (with the place of each key), a sequence or a scalar."""

    place: Place
    value: Mapping[str, Node] | tuple[Node, ...] | bool | int | float | str | None
    keys: Mapping[str, Place]

    @property
    def data(self) -> Any:
        """The value as plain dicts, lists and scalars."""
        if isinstance(self.value, Mapping):
            return {key: node.data for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.data for node in self.value]
        return self.value

    def find(self, path: Sequence[str | int]) -> Node | None:
        """The node at ``path``, or None where there is none."""
        node: Node | None = self
        for part in path:
            node = node.child(part) if node is not None else None
        return node

    def child(self, part: str | int) -> Node | None:
        """The value under a key, or the element at an index."""
        if isinstance(self.value, Mapping) and isinstance(part, str):
            return self.value.get(part)
        if isinstance(self.value, tuple) and isinstance(part, int) and part < len(self.value):
            return self.value[part]
        return None


def scalar(value: bool | int | float | str | None, place: Place) -> Node:
    """A node that holds one scalar."""
    return Node(place=place, value=value, keys={})


def mapping(items: Mapping[str, Node], keys: Mapping[str, Place], place: Place) -> Node:
    """A node that holds a mapping."""
    return Node(place=place, value=items, keys=keys)


def relocated(node: Node, place: Place) -> Node:
    """``node`` with every place in it replaced: a value from the command line has no line."""
    value = node.value
    if isinstance(value, Mapping):
        value = {key: relocated(child, place) for key, child in value.items()}
    elif isinstance(value, tuple):
        value = tuple(relocated(child, place) for child in value)
    return replace(node, place=place, value=value, keys=dict.fromkeys(node.keys, place))

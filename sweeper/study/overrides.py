"""``--set path=value``: values of the command line, laid over the file before it is checked.

``path`` is dotted and reaches every part of the file: ``search.trials``, ``data.name``,
``parameters.optimizer.lr.low``, ``reference.trials.0.note``. ``value`` is YAML:
``--set optimizer.lr=1e-3``, ``--set "parameters.model.blocks=[2, 4]"``. Three rules go beyond
replacing a value:

- A field that is a parameter of the study becomes fixed: after ``model.patch=8`` every trial has
  patch 8, ``parameters.model.patch`` is gone, conditions that 8 meets are met, and parameters
  whose conditions it does not meet are gone too. A parameter that holds only under a condition
  keeps it, with the one value. The same goes for parameters inside what is set
  (``model={name: mlp}``), and for a ``name`` whose section is a parameter; anything else inside a
  parameter cannot be set.
- Setting a ``name`` to another variant drops the fields that only the former one has.
- ``parameters.model.patch=null`` removes the parameter; the section's value counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sweeper.errors import Mistake
from sweeper.space import same
from sweeper.study.nodes import Node, Place, mapping, relocated, scalar
from sweeper.study.source import compose
from sweeper.study.spec import SECTIONS
from sweeper.study.variants import default_name, foreign_fields, parameter_paths, variants

FILE: Final = "--set"
"""The ``file`` of a mistake in an override."""
_PARAMETER_KEYS: Final = ("values", "low", "high", "log", "step", "when")


class _CannotSetError(Exception):
    """Why an override can be set nowhere."""


def overridden(root: Node, overrides: Sequence[str]) -> tuple[Node, list[Mistake]]:
    """``root``, a mapping, with every override set in turn, and what was wrong with overrides."""
    mistakes = []
    for override in overrides:
        path, _, text = override.partition("=")
        path = path.strip()
        try:
            if not path or "=" not in override:
                raise _CannotSetError("an override must read path=value, as in search.trials=20")
            root = _apply(root, path, _parsed(text, override))
        except _CannotSetError as error:
            message = f"{error} (--set {override})"
            mistakes.append(Mistake(file=FILE, line=0, column=0, path=path, message=message))
    return root, mistakes


def _parsed(text: str, override: str) -> Node:
    node, wrong = compose(text, FILE)
    if node is None or wrong:
        raise _CannotSetError(f"the value must be YAML, but: {wrong[0].message}")
    return relocated(node, Place(file=FILE, line=0, column=0, override=override))


def _apply(root: Node, path: str, value: Node) -> Node:
    section, _, field = path.partition(".")
    if section == "parameters" and value.value is None and field in _items(_parameters(root)):
        return _with_parameters(root, _without(_parameters(root), field))
    known = _items(_parameters(root))
    outer = next((each for each in known if path.startswith(f"{each}.")), None)
    if outer is not None and path not in known:
        if path == f"{outer}.name":
            return _apply(root, outer, value)
        raise _CannotSetError(
            f"nothing can be set inside {outer}, which is a parameter; set {outer} itself, or "
            f"parameters.{outer}"
        )
    inside = [each for each in known if each.startswith(f"{path}.")]
    for inner in sorted(inside, key=lambda each: (each.count("."), not each.endswith(".name"))):
        own = _given(value, inner.removeprefix(f"{path}.").split("."))
        if own is not None and inner in _items(_parameters(root)):  # not excluded by one before it
            root = _fixed(root, inner, own)
    if path in known:
        return _fixed(root, path, value)
    return _assigned(root, (), _keys(root, path), value)


def _given(value: Node, words: Sequence[str]) -> Node | None:
    """What ``value`` says at the path ``words`` below it, or None; a text is its own name."""
    found = value.find(words[:-1])
    if found is not None and words[-1] == "name" and isinstance(found.value, str):
        return found
    return value.find(words)


def _items(node: Node | None) -> dict[str, Node]:
    return dict(node.value) if node is not None and isinstance(node.value, dict) else {}


def _parameters(root: Node) -> Node:
    return root.child("parameters") or mapping({}, {}, root.place)


def _with_parameters(root: Node, parameters: Node) -> Node:
    return _with(root, "parameters", parameters)


def _with(node: Node, key: str, value: Node) -> Node:
    own = node.keys.get(key)
    place = value.place if own is None or value.place.override else own
    return mapping({**_items(node), key: value}, {**node.keys, key: place}, node.place)


def _without(node: Node, key: str) -> Node:
    items = {name: value for name, value in _items(node).items() if name != key}
    return mapping(items, {name: node.keys[name] for name in items}, node.place)


def _fixed(root: Node, path: str, value: Node) -> Node:
    """Every trial has ``value`` at ``path``, which has been a parameter."""
    parameters = _parameters(root)
    own = parameters.child(path)
    when = own.child("when") if own is not None else None
    when = when if _items(when) else None
    # The values of a parameter around this one go over whatever the section has here.
    kept = when is not None or any(path.startswith(f"{each}.") for each in _items(parameters))
    if kept:
        entry = replace(value, value=(value,), keys={})
        if when is not None:
            keys = {"values": value.place, "when": when.place}
            entry = mapping({"values": entry, "when": when}, keys, value.place)
        parameters = _with(_without(parameters, path), path, entry)
    else:
        parameters = _without(parameters, path)
        root = _assigned(root, (), path.split("."), value)
    if isinstance(value.value, bool | int | float | str):
        parameters = _resolved(parameters, path, value, keep=kept)
    return _with_parameters(root, parameters)


def _resolved(parameters: Node, path: str, value: Node, *, keep: bool) -> Node:
    """``parameters`` without the conditions on ``path``, and without those that it excludes."""
    excluded = []
    for name, entry in _items(parameters).items():
        when = entry.child("when")
        options = when.child(path) if when is not None else None
        if when is None or options is None:
            continue
        if not any(same(option, value.data) for option in _options(options)):
            excluded.append(name)
            continue
        left = _with(when, path, value) if keep else _without(when, path)
        entry = _with(entry, "when", left) if _items(left) else _without(entry, "when")
        parameters = _with(parameters, name, entry)
    for name in excluded:
        parameters = _excluded(parameters, name)
    return parameters


def _excluded(parameters: Node, path: str) -> Node:
    """``parameters`` without ``path``, and without whatever needs it."""
    waiting = [path]
    while waiting:
        path = waiting.pop()
        parameters = _without(parameters, path) if parameters.child(path) else parameters
        waiting += [
            name
            for name, entry in _items(parameters).items()
            if path in _items(entry.child("when"))
        ]
    return parameters


def _options(node: Node) -> list[object]:
    return node.data if isinstance(node.value, tuple) else [node.data]


def _keys(root: Node, path: str) -> list[str]:
    """``path`` taken apart: under ``parameters``, ``when`` and ``params`` a key holds dots."""
    keys: list[str] = []
    rest = path.split(".")
    while rest:
        length = 1
        if keys[-1:] in (["parameters"], ["when"], ["params"]):
            length = _key_length(_items(_found(root, keys)), rest)
        keys.append(".".join(rest[:length]))
        rest = rest[length:]
    return keys


def _found(root: Node, keys: Sequence[str]) -> Node | None:
    return root.find([key if (index := _index(key)) is None else index for key in keys])


def _index(key: str) -> int | None:
    return int(key) if key.isdecimal() and len(key) < 10 else None


def _key_length(known: dict[str, Node], rest: Sequence[str]) -> int:
    """How many words of ``rest`` are one dotted key."""
    names = {*known, *parameter_paths()}
    for length in range(len(rest), 0, -1):
        if ".".join(rest[:length]) in names:
            return length
    for index, word in enumerate(rest):
        if index > 1 and word in _PARAMETER_KEYS:
            return index
    return len(rest)


def _assigned(node: Node | None, done: tuple[str, ...], keys: Sequence[str], value: Node) -> Node:
    """``node``, which stands at ``done``, with ``value`` at ``keys`` below it."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if node is not None and isinstance(node.value, tuple):
        return _in_list(node, done, keys, value)
    node = _opened(node, done, key, value.place)
    if key == "name" and not rest and isinstance(value.value, str):
        data = {name: child.data for name, child in _items(node).items()}
        for name in foreign_fields(".".join(done), data, value.value):
            node = _without(node, name)
    return _with(node, key, _assigned(node.child(key), (*done, key), rest, value))


def _in_list(node: Node, done: tuple[str, ...], keys: Sequence[str], value: Node) -> Node:
    elements = node.value if isinstance(node.value, tuple) else ()
    if len(done) == 2 and done[0] == "parameters" and keys[0] in _PARAMETER_KEYS:
        entry = mapping({"values": node}, {"values": node.place}, node.place)
        return _assigned(entry, done, keys, value)
    index = _index(keys[0])
    if index is None or index >= len(elements):
        raise _CannotSetError(
            f"{'.'.join(done)} is a list, whose entries are 0 to {len(elements) - 1}, but got "
            f"{keys[0]!r}"
        )
    changed = _assigned(elements[index], (*done, keys[0]), keys[1:], value)
    return replace(node, value=(*elements[:index], changed, *elements[index + 1 :]))


def _opened(node: Node | None, done: tuple[str, ...], key: str, place: Place) -> Node:
    """The mapping at ``done``, made of what may stand there in place of one."""
    path = ".".join(done)
    if node is None or node.value is None:
        node = mapping({}, {}, place)
        name = default_name(path) if len(variants(path)) > 1 and key != "name" else None
        return _with(node, "name", scalar(name, place)) if name else node
    if isinstance(node.value, dict):
        return node
    if isinstance(node.value, str) and (len(variants(path)) > 1 or path == "objective"):
        word = "metric" if path == "objective" else "name"
        return mapping({word: node}, {word: node.place}, node.place)
    where = path if path.split(".")[0] in SECTIONS else path or "the file"
    raise _CannotSetError(f"nothing can be set inside {where}, which is {node.data!r}")

"""Every point of a search space, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sweeper.space import Range, Values, ordered, possible


def _points(path: str, parameter: Values | Range) -> Sequence[Any]:
    points = parameter.values if isinstance(parameter, Values) else parameter.points
    if points is None:
        raise ValueError(f"{path}: a grid needs a list of values or a step")
    return points


def grid(parameters: Mapping[str, Values | Range]) -> Iterator[dict[str, Any]]:
    """Every combination of values, the last parameter fastest, with conditions observed.

    Raises ValueError for a continuous range, which has no grid points.
    """
    order = ordered(parameters)
    options = {path: _points(path, parameters[path]) for path in order}

    def points() -> Iterator[dict[str, Any]]:
        # An odometer: one iterator a parameter, so that a thousand parameters need no recursion.
        chosen: dict[str, Any] = {}
        open_: list[Iterator[Any]] = []
        while True:
            while len(open_) < len(order):
                path = order[len(open_)]
                held = parameters[path].holds(chosen)
                open_.append(iter(options[path]) if held else iter(()))
                if held:
                    chosen[path] = next(open_[-1])
            yield dict(chosen)
            while open_:
                path = order[len(open_) - 1]
                if (value := next(open_[-1], _END)) is not _END:
                    chosen[path] = value
                    break
                chosen.pop(path, None)
                open_.pop()
            if not open_:
                return

    return points()


_END: Final = object()


def grid_size(parameters: Mapping[str, Values | Range], limit: int = 1_000_000) -> int:
    """How many points :func:`grid` has, counted up to ``limit``.

    Nothing is enumerated: a parameter that no condition names multiplies the count, and of one
    that a condition names only the values that conditions tell apart are followed.
    """
    order = ordered(parameters)
    last_use = {
        parent: index for index, path in enumerate(order) for parent in parameters[path].when
    }
    # The key: what is chosen for the parents that are still needed, as index into ``told``.
    counts: dict[tuple[tuple[str, int], ...], int] = {(): 1}
    told: dict[str, list[Any]] = {}
    for index, path in enumerate(order):
        size = len(_points(path, parameters[path]))
        told[path] = _told_apart(path, parameters)
        grown: dict[tuple[tuple[str, int], ...], int] = {}
        for chosen, count in counts.items():
            values = {name: told[name][which] for name, which in chosen if which >= 0}
            kept = tuple(pair for pair in chosen if last_use[pair[0]] > index)
            branches = [(kept, count)]
            if parameters[path].holds(values):
                branches = [(kept, count * size)]
                if last_use.get(path, -1) > index:
                    rest = size - len(told[path])
                    branches = [((*kept, (path, i)), count) for i in range(len(told[path]))]
                    branches += [((*kept, (path, -1)), count * rest)] if rest else []
            for key, more in branches:
                grown[key] = grown.get(key, 0) + more
        counts = grown
        if sum(counts.values()) >= limit:  # every partial point grows into one point at least
            return limit
    return sum(counts.values())


def _told_apart(path: str, parameters: Mapping[str, Values | Range]) -> list[Any]:
    """The values of ``path`` that some condition names, each once."""
    named = [option for other in parameters.values() for option in other.when.get(path, ())]
    return possible(parameters[path], named)

"""A study file that may have mistakes, as a spec that has none: what the later checks look at.

Whatever pydantic refuses is reported and then left out or replaced, so that one mistake does not
hide the others. ``broken`` remembers what was refused: a check that depends on it is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Final

from pydantic import ValidationError

from sweeper.study.messages import Finding, Path, findings
from sweeper.study.nodes import Node
from sweeper.study.spec import StudySpec

_STAND_INS: Final[Mapping[str, Any]] = {
    "name": "unnamed",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
}
"""What takes the place of a required section that is missing or of no use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """``spec``: as much of the file as could be read; ``broken``: paths of what could not."""

    root: Node
    spec: StudySpec
    broken: frozenset[Path]

    def sound(self, *path: str | int) -> bool:
        """Whether nothing at, above or below ``path`` was refused."""
        return not any(
            broken[: len(path)] == path or path[: len(broken)] == broken for broken in self.broken
        )

    def without(self, found: Iterable[Finding]) -> Draft:
        """The draft with the parts that ``found`` is about counted as broken too."""
        more = {_part(finding) for finding in found if finding.path}
        return replace(self, broken=self.broken | more)


def draft(root: Node) -> tuple[Draft, list[Finding]]:
    """The spec of ``root``, which is a mapping, and what pydantic refuses in it."""
    data = _with_absolute_root(root.data)
    found: list[Finding] = []
    broken: set[Path] = set()
    for _ in range(3):
        try:
            spec = StudySpec.model_validate(data)
            return Draft(root=root, spec=spec, broken=frozenset(broken)), found
        except ValidationError as error:
            refused = findings(error, StudySpec)
        if not found:
            found = refused
        for finding in refused:
            part = _part(finding)
            part = part if part not in broken else part[:1]
            _leave_out(data, part)
            broken.add(part)
    # Leaving out parts did not help: keep the sections that nothing was said of.
    kept = {key: data[key] for key in data if not any(part[0] == key for part in broken)}
    spec = StudySpec.model_validate({**_STAND_INS, **kept})
    return Draft(
        root=root,
        spec=spec,
        broken=frozenset({*broken, *((key,) for key in data if key not in kept)}),
    ), found


def _part(finding: Finding) -> Path:
    """How much has to go because of ``finding``."""
    path = finding.path
    match path[0]:
        case "parameters":
            return path[:2]
        case "objective":
            return path[:1]
        case "reference":
            return path[:3]
        case "data" | "model" if finding.at == "section" or path[-1] == "name":
            return path[:1]
    return path


def _leave_out(data: dict[str, Any], path: Path) -> None:
    """Remove what is at ``path``, or put something harmless in its place."""
    if len(path) == 1 and path[0] in _STAND_INS:
        data[str(path[0])] = copy.deepcopy(_STAND_INS[str(path[0])])
        return
    target: Any = data
    for part in path[:-1]:
        inner = target[part] if _has(target, part) else None
        if not isinstance(inner, dict | list):
            data.pop(str(path[0]), None)
            return
        target = inner
    if path == ("reference", "source"):
        target["source"] = ""
    elif isinstance(target, list) and _has(target, path[-1]):
        target[path[-1]] = {}  # type: ignore[index]  # _has: an index of this list
    elif isinstance(target, dict):
        target.pop(path[-1], None)


def _has(container: Any, part: str | int) -> bool:
    if isinstance(container, list):
        return isinstance(part, int) and part < len(container)
    return isinstance(container, dict) and part in container


def _with_absolute_root(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with every image folder made absolute: workers start in folders of their own."""
    result = copy.deepcopy(data)
    section = result.get("data")
    if isinstance(section, dict) and "root" in section:
        section["root"] = _absolute(section["root"])
    parameters = result.get("parameters")
    for path, parameter in parameters.items() if isinstance(parameters, dict) else ():
        if path == "data.root":
            values = parameter.get("values") if isinstance(parameter, dict) else parameter
            if isinstance(values, list):
                values[:] = map(_absolute, values)
        when = parameter.get("when") if isinstance(parameter, dict) else None
        if isinstance(when, dict) and "data.root" in when:
            options = when["data.root"]
            listed = isinstance(options, list)
            when["data.root"] = [*map(_absolute, options)] if listed else _absolute(options)
    reference = result.get("reference")
    trials = reference.get("trials") if isinstance(reference, dict) else None
    for trial in trials if isinstance(trials, list) else ():
        params = trial.get("params") if isinstance(trial, dict) else None
        if isinstance(params, dict) and "data.root" in params:
            params["data.root"] = _absolute(params["data.root"])
    return result


def _absolute(root: Any) -> Any:
    if not isinstance(root, str) or not root:
        return root
    try:
        return str(FilePath(root).expanduser().absolute())
    except RuntimeError:  # a "~name" whose home is unknown: the folder check will name it
        return root

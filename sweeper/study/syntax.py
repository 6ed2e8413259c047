"""What is wrong with a text that is no YAML, in plain English."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import yaml

Where = tuple[int, int]

_TOKENS: Final = {
    "<block mapping start>": "an indented mapping",
    "<block sequence start>": "an indented list",
    "<block end>": "the end of the indentation",
    "<stream end>": "the end of the file",
    "<document start>": "'---'",
    "<document end>": "'...'",
    "<scalar>": "a value",
    "<alias>": "an alias",
    "<anchor>": "an anchor",
    "<tag>": "a tag",
    "?": "a key",
    "-": "a list entry",
}


def _token(name: str) -> str:
    return _TOKENS.get(name, f"'{name}'")


def _bad_start(found: re.Match[str], line: int) -> str:
    character = found[1]
    if character == "\\t":
        return "lines must be indented, and values set apart, with spaces, but here is a tab"
    return f"a text must not begin with {character}; put it in quotes"


# What PyYAML says (context and problem joined) → what we say, given the match and the line
# in which the thing begins; whether to point at that beginning instead of where it broke off.
_PLAIN: Final[tuple[tuple[str, bool, Callable[[re.Match[str], int], str]], ...]] = (
    (r"found character '(.+)' that cannot start any token", False, _bad_start),
    (
        r"mapping values are not allowed here",
        False,
        lambda found, line: (
            "there must be one 'key: value' a line, indented like its neighbours, but here is "
            "another ':'; put a text that holds ': ' in quotes"
        ),
    ),
    (
        r"sequence entries are not allowed here|mapping keys are not allowed here",
        False,
        lambda found, line: "a list entry ('- ') or key ('? ') must begin a line of its own",
    ),
    (
        r"could not find expected ':'",
        True,
        lambda found, line: "a key must be followed by ': ', but this line has none",
    ),
    (
        r"while parsing a block (mapping|collection).*expected <block end>, but found '(.+)'",
        False,
        lambda found, line: (
            f"lines of one {'mapping' if found[1] == 'mapping' else 'list'} must be indented "
            f"alike, but {_token(found[2])} does not continue the one that begins in line {line}"
        ),
    ),
    (
        r"while parsing a flow (mapping|sequence).*expected ',' or '(.)', but got '(.+)'",
        False,
        lambda found, line: (
            f"the {'mapping' if found[1] == 'mapping' else 'list'} that begins in line {line} "
            f"must go on with ',' or end with '{found[2]}', but here is {_token(found[3])}"
        ),
    ),
    (
        r"expected the node content, but found '(.+)'",
        False,
        lambda found, line: f"there must be a value here, but there is {_token(found[1])}",
    ),
    (
        r"while scanning a quoted scalar.*found unexpected (end of stream|document separator)",
        True,
        lambda found, line: "the quote that opens here must be closed",
    ),
    (
        r"found unknown escape character '(.+)'",
        False,
        lambda found, line: (
            f"\\{found[1]} means nothing between double quotes; use single quotes, or \\\\"
        ),
    ),
    (
        r"while scanning an (alias|anchor)",
        True,
        lambda found, line: "a text must not begin with * or &; put it in quotes",
    ),
    (
        r"while (scanning|parsing) a tag|undefined tag handle",
        True,
        lambda found, line: "a text must not begin with !; put it in quotes",
    ),
    (
        r"while scanning a directive|YAML directive|incompatible YAML|<document start>",
        False,
        lambda found, line: "a study file holds one mapping, without '%' lines or '---' in it",
    ),
)


def explained(error: Exception, reached: Where) -> tuple[int, int, str]:
    """Line, column and message for an error of PyYAML's scanner or parser.

    ``reached`` is how far it had read, for errors that carry no place.
    """
    if not isinstance(error, yaml.MarkedYAMLError):
        return (*reached, "this escape or number must stand for something, but does not")
    broke_off = error.problem_mark or error.context_mark
    began = error.context_mark or broke_off
    said = f"{error.context or ''} {error.problem or ''}"
    for pattern, at_beginning, message in _PLAIN:
        if found := re.search(pattern, said, re.DOTALL):
            mark = began if at_beginning else broke_off
            line = began.line + 1 if began else reached[0]
            return (*_place(mark, reached), message(found, line))
    return (*_place(broke_off, reached), f"this must be YAML, but: {error.problem}")


def _place(mark: yaml.Mark | None, reached: Where) -> Where:
    return (mark.line + 1, mark.column + 1) if mark else reached

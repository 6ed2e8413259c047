"""Text for a terminal, from studies, servers and exceptions, without what a terminal obeys.

A description, a file's name or an error message may hold escape sequences that clear the screen,
rename the window or hide what was there. They are shown, not obeyed: ``\\x1b`` appears as ``␛``.
"""

from __future__ import annotations

import logging
import unicodedata
from functools import lru_cache
from typing import Final

from sweeper.private import redacted

_KEPT: Final = frozenset("\n\t")
_PICTURES: Final = 0x2400
"""Where Unicode has pictures of the control characters, in their order."""


def plain(text: str) -> str:
    """``text`` with every character that is not to be seen replaced by one that is."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


@lru_cache(maxsize=4096)
def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if character in _KEPT or kind not in {"Cc", "Cf", "Cs", "Zl", "Zp"}:
        return character
    if ord(character) < 0x20:
        return chr(_PICTURES + ord(character))
    return "␡" if character == "\x7f" else "�"


class PlainFormatter(logging.Formatter):
    """Log lines with nothing secret and nothing that a terminal obeys in them."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(redacted(super().format(record)))

"""“Did you mean …”: the nearest of the known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """``; did you mean 'adam'?`` where something close is known, else nothing."""
    near = difflib.get_close_matches(found, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""

"""“Did you mean …”: the nearest of the known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

_ELSEWHERE: Final = {
    **dict.fromkeys(("min", "lower", "start"), "low"),
    **dict.fromkeys(("max", "upper", "stop"), "high"),
    **dict.fromkeys(("value", "choices", "options"), "values"),
    "q": "step",
    "n_trials": "trials",
    "batch": "batch_size",
    "learning_rate": "lr",
    "drop": "dropout",
    "width": "embed_dim",
    "dim": "embed_dim",
}
"""What other tools, and the reports, call our names."""


def nearest(found: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that was probably meant, or None."""
    words = list(known)
    if (meant := _ELSEWHERE.get(found)) in words:
        return meant
    near = difflib.get_close_matches(found, words, n=1, cutoff=0.6)
    return near[0] if near else None


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """``; did you mean 'adam'?`` where something close is known, else nothing."""
    meant = nearest(found, known)
    return f"; did you mean {meant!r}?" if meant else ""

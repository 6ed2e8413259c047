"""How names, numbers and times read in a report: one place, whatever the format of the table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

NOTHING: Final = "–"
"""What stands in a cell without a value."""

_TITLES: Final = {
    "mean_seconds": "s an epoch, training",
    "mean_val_seconds": "s an epoch, validation",
    "seconds": "s an epoch",
    "val_seconds": "s an epoch, validation",
    "samples_per_s": "images a second",
    "peak_memory_mib": "peak memory, MiB",
    "model_parameters": "parameters",
    "best_epoch": "best epoch",
    "test_accuracy_last": "test accuracy, last epoch",
    "test_loss_last": "test loss, last epoch",
    "lr": "learning rate",
}
_LESS_IS_BETTER: Final = ("loss", "seconds", "memory")


def metric_title(name: str) -> str:
    """A metric's name for people: ``max_val_accuracy`` is “max val accuracy”."""
    return _TITLES.get(name, name.replace("_", " "))


def better_when_higher(name: str) -> bool | None:
    """Whether more of a metric is better; None where neither is (a number of parameters)."""
    if "accuracy" in name or name == "samples_per_s":
        return True
    return False if any(word in name for word in _LESS_IS_BETTER) else None


def metric(name: str, value: float | None) -> str:
    """A value of the metric ``name`` with the digits that count there."""
    if value is None or math.isnan(value):
        return NOTHING
    if name in {"model_parameters", "parameters", "best_epoch", "samples_per_s"}:
        return count(value)
    if name.endswith("seconds"):
        return f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"
    return number(value)


def number(value: float | None) -> str:
    """A measurement with four decimals, or three significant digits where those say more."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return minus(plain(value, digits=3))
    return minus(f"{value:.4f}")


def signed(name: str, value: float | None) -> str:
    """A difference of two values of the metric ``name``, always with its sign."""
    if value is None or math.isnan(value):
        return NOTHING
    # An accuracy's digits are those of what it is the difference of.
    text = f"{abs(value):.4f}" if "accuracy" in name else metric(name, abs(value))
    if not any(digit in text for digit in "123456789∞"):
        return f"±{text}"
    return ("+" if value > 0 else "−") + text


def minus(text: str) -> str:
    """``text`` with a real minus sign, which is as wide as the plus."""
    return text.replace("-", "−") if text.startswith("-") else text


def count(value: float) -> str:
    """A whole number, thousands set apart: ``2,188,298``."""
    return f"{round(value):,}"


def duration(seconds: float | None) -> str:
    """Seconds as people read them: ``0.4 s``, ``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def value(setting: Any) -> str:
    """A parameter's value in a few words, numbers with the digits that count.

    >>> value([{"name": "crop", "size": 28, "padding": 0}, "flip"])
    'crop (size 28, padding 0) + flip'
    """
    if setting is None:
        return NOTHING
    if isinstance(setting, str):
        return setting
    if isinstance(setting, float):
        return f"{setting:.4g}" if setting == 0 or 1e-4 <= abs(setting) < 1e6 else plain(setting)
    if isinstance(setting, Mapping):
        name = setting.get("name")
        rest = ", ".join(f"{key} {value(each)}" for key, each in setting.items() if key != "name")
        return rest if name is None else f"{name} ({rest})" if rest else str(name)
    if isinstance(setting, list | tuple):
        return " + ".join(value(each) for each in setting) or "none"
    return json.dumps(setting, ensure_ascii=False)


def plain(setting: float, *, digits: int = 4) -> str:
    """A very small or large number as people write it: ``2.5e-05`` is ``2.5e-5``."""
    shown, _, exponent = f"{setting:.{digits}g}".partition("e")
    return f"{shown}e{int(exponent)}" if exponent else shown


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """A column title for each dotted path, as short as it can be among the others.

    >>> short_names(["optimizer.lr", "optimizer.name", "train.batch_size", "model.name"])
    {'optimizer.lr': 'lr', 'optimizer.name': 'optimizer', 'train.batch_size': 'batch size', \
'model.name': 'model'}
    """
    wanted = {path: _leaf(path) for path in paths}
    times = Counter(wanted.values())
    return {
        path: (title if times[title] == 1 else path).replace("_", " ")
        for path, title in wanted.items()
    }


def _leaf(path: str) -> str:
    parts = path.split(".")
    return parts[-2] if parts[-1] == "name" and len(parts) > 1 else parts[-1]


def plural(number_of: int, word: str, words: str | None = None) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{number_of:,} {word if number_of == 1 else words or word + 's'}"


def last_line(error: str) -> str:
    """What a traceback comes down to."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"

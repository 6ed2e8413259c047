"""How many trials at once are the fastest for a structure on a device: measured once, remembered.

A cohort of K copies of the configuration is trained on a few batches of its own data set, for
growing K, until more bring nothing or memory does not suffice. One trial alone is measured as it
would run alone, with its own CUDA graph.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from sweeper.config import TrialConfig
from sweeper.data import Dataset, Part
from sweeper.training.cohort.engine import CohortEngine
from sweeper.training.cohort.rules import structure
from sweeper.training.engine import Engine

_log = logging.getLogger(__name__)
SIZES: Final = (1, 4, 16, 64, 256)
_BATCHES: Final = 20
_WORTH: Final = 1.05
"""More trials at once have to train so many times as fast as fewer; else fewer are better."""
_MEMORY_SHARE: Final = 0.9


def best_size(config: TrialConfig, *, dataset: Dataset, device: torch.device, file: Path) -> int:
    """The number of trials at once with the most images a second in all.

    Remembered in ``file`` (JSON) by structure, device and torch's version. A file that cannot be
    read or written costs a measurement, never a trial.
    """
    key = f"{structure(config)} {_device_name(device)} torch {torch.__version__}"
    known = _read(file)
    if key in known:
        return int(known[key]["size"])
    rates = throughputs(config, dataset=dataset, device=device)
    size = chosen(rates)
    _log.info(
        "trials at once on %s, images a second in all: %s; taken: %d",
        _device_name(device),
        ", ".join(f"{k}: {rate:,.0f}" for k, rate in rates.items()),
        size,
    )
    _write(file, {**_read(file), key: {"size": size, "samples_per_s": rates}})
    return size


def chosen(rates: Mapping[int, float]) -> int:
    """The smallest number that no larger one beats by what makes it worth it."""
    best = 1
    for size in sorted(rates):
        if rates[size] > rates.get(best, 0.0) * _WORTH:
            best = size
    return best


def throughputs(
    config: TrialConfig,
    *,
    dataset: Dataset,
    device: torch.device,
    sizes: Sequence[int] = SIZES,
    batches: int = _BATCHES,
) -> dict[int, float]:
    """Images a second, all trials together, by the number of trials at once.

    Larger numbers are not tried once one of them is slower than the one before, or once it is to
    be expected that memory does not suffice.
    """
    count = min(len(dataset.train), batches * config.train.batch_size)
    part = Part(images=dataset.train.images[:count], labels=dataset.train.labels[:count])
    few = replace(dataset, train=part)
    rates: dict[int, float] = {}
    before = 0.0
    for size in sizes:
        try:
            with _memory(device) as used:
                rate = count * size / _seconds(config, few, device, size)
        except (MemoryError, torch.OutOfMemoryError):
            _log.info("memory does not suffice for %d trials at once", size)
            break
        rates[size] = rate
        following = min((each for each in sizes if each > size), default=size)
        if rate < before or used[0] * following / size > _MEMORY_SHARE:
            break
        before = rate
    return rates


def _seconds(config: TrialConfig, dataset: Dataset, device: torch.device, size: int) -> float:
    """Seconds of one pass, after one that warms up."""
    lr = config.optimizer.lr
    if size == 1:
        engine = Engine(config, dataset=dataset, device=device)
        try:
            return min(
                engine.train(epoch=epoch, lr=lr, before_batch=_nothing).seconds for epoch in (1, 2)
            )
        finally:
            engine.drop_graph()
    cohort = CohortEngine(config, dataset=dataset, device=device)
    try:
        cohort.arrange([cohort.seat(config) for _ in range(size)])
        return min(
            cohort.train(epochs=[epoch] * size, lrs=[lr] * size, before_batch=_nothing)[0].seconds
            for epoch in (1, 2)
        )
    finally:
        cohort.drop_graph()


@contextlib.contextmanager
def _memory(device: torch.device) -> Iterator[list[float]]:
    """A list that afterwards holds what was used at most, as a share of what was free before."""
    used = [0.0]
    if device.type != "cuda":
        yield used
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    free, _ = torch.cuda.mem_get_info(device)
    try:
        yield used
        used[0] = (torch.cuda.max_memory_reserved(device) - before) / max(1, free)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
        temporary.replace(file)
    except OSError as error:
        _log.warning("what was measured cannot be kept in %s: %s", file, error)


def _nothing() -> None:
    pass

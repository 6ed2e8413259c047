"""How many trials at once, and in which way, are the fastest for a structure on a device: measured
once; `sweeper.training.cohort.choice` remembers it.

Copies of the configuration are trained on a few batches of its own data set, as a cohort and in
lanes of their own (`sweeper.training.lanes`), for growing numbers, until more bring nothing or
memory does not suffice. One trial alone is measured as it would run alone, with its own CUDA graph.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import torch

from sweeper.config import TrialConfig
from sweeper.data import Dataset, Part
from sweeper.errors import UsageError
from sweeper.training.capture import CaptureError
from sweeper.training.cohort.choice import (
    Choice,
    Measured,
    Rates,
    device_name,
    known_way,
    recalled,
    remember,
)
from sweeper.training.cohort.engine import CohortEngine
from sweeper.training.cohort.rules import Way, why_alone
from sweeper.training.compiling import Compiling, lacking
from sweeper.training.engine import Engine
from sweeper.training.lanes import Lane, all_done
from sweeper.training.network import Pass

_log = logging.getLogger(__name__)
SIZES: Final = (1, 4, 16, 64, 256)
_MOST_STREAMS: Final = 32
"""Torch has so many streams a device; more lanes would share them."""
_BATCHES: Final = 20
_MEMORY_SHARE: Final = 0.9


def best_way(
    config: TrialConfig,
    *,
    dataset: Dataset,
    device: torch.device,
    file: Path,
    compiling: Compiling | None = None,
    most: float = math.inf,
    stop: Callable[[], bool] = lambda: False,
) -> Choice:
    """The way and the number with the most images a second in all, for a study of ``most`` trials:
    numbers that it cannot fill are not tried.

    Remembered in ``file`` (JSON) by structure, device and torch's version. A file that cannot be
    read or written costs a measurement, never a trial. With ``train.compile: on`` cohorts are
    compiled, one for every number that is tried, and lanes are not measured. With ``auto`` and a
    study that is long enough, cohorts are measured both ways. Where ``stop`` says so, nothing more
    is measured and nothing remembered: one alone it is then.
    """
    known = known_way(config, device=device, file=file, compiling=compiling, most=most)
    if known is not None:
        return known
    sizes = [size for index, size in enumerate(SIZES) if not index or SIZES[index - 1] < most]
    up_to = None if len(sizes) == len(SIZES) else sizes[-1]
    measured = recalled(config, device=device, file=file)
    if measured is None or not measured.suffices(most):
        rates = _plain(config, dataset, device, compiling, sizes, stop)
        measured = replace(
            measured or Measured(rates=rates, images=len(dataset.train)), rates=rates, up_to=up_to
        )
    choice = measured.choice()
    if (
        config.train.compile == "auto"
        and compiling is not None
        and measured.is_long(config, compiling, device)
    ):
        if not measured.compiled_suffices(most):
            compiled = _compiled(config, dataset, device, compiling, sizes, stop)
            measured = replace(measured, compiled=compiled, compiled_up_to=up_to)
        choice = measured.choice_compiled()
    if stop():
        return Choice(way="alone", size=1, beside=1)
    _log.info("taken: %s, %d at once", choice.way, choice.size)
    remember(config, measured, device=device, file=file)
    return choice


def _plain(
    config: TrialConfig,
    dataset: Dataset,
    device: torch.device,
    compiling: Compiling | None,
    sizes: Sequence[int],
    stop: Callable[[], bool],
) -> Mapping[Way, Rates]:
    """Every way, as the configuration has it."""
    ways: list[Way] = ["streams"] if why_alone(config, device) else ["cohort", "streams"]
    if config.train.compile == "on":
        ways = ways[:1]  # every lane would compile its own step
    else:
        config = _compiling(config, "off")
    rates = throughputs(
        config,
        dataset=dataset,
        device=device,
        ways=ways,
        sizes=sizes,
        compiling=compiling,
        stop=stop,
    )
    for way, found in rates.items():
        _say(f"by {way}", found, device)
    return rates


def _compiled(
    config: TrialConfig,
    dataset: Dataset,
    device: torch.device,
    how: Compiling,
    sizes: Sequence[int],
    stop: Callable[[], bool],
) -> Rates:
    """Compiled cohorts; nothing where that cannot be done."""
    if why_alone(config, device) or lacking(device):
        return {}
    on = _compiling(config, "on")
    try:
        found = throughputs(
            on,
            dataset=dataset,
            device=device,
            ways=["cohort"],
            sizes=sizes,
            compiling=how,
            stop=stop,
        )
    except (UsageError, RuntimeError) as error:  # one alone cannot be
        _log.warning("cohorts of this structure are not compiled: %s", error)
        return {}
    _say("by compiled cohort", found["cohort"], device)
    return found["cohort"]


def _compiling(config: TrialConfig, switch: Literal["on", "off"]) -> TrialConfig:
    train = config.train.model_copy(update={"compile": switch})
    return config.model_copy(update={"train": train})


def _say(way: str, rates: Rates, device: torch.device) -> None:
    text = ", ".join(f"{k}: {rate:,.0f}" for k, rate in rates.items())
    name = device_name(device)
    _log.info("trials at once on %s %s, images a second in all: %s", name, way, text)


def throughputs(
    config: TrialConfig,
    *,
    dataset: Dataset,
    device: torch.device,
    ways: Sequence[Way] = ("cohort", "streams"),
    sizes: Sequence[int] | None = None,
    batches: int = _BATCHES,
    compiling: Compiling | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[Way, dict[int, float]]:
    """Images a second, all trials together, by way and number of trials at once.

    Larger numbers are not tried once one of them is slower than the one before, or once it is to
    be expected that memory does not suffice.
    """
    count = min(len(dataset.train), batches * config.train.batch_size)
    part = Part(images=dataset.train.images[:count], labels=dataset.train.labels[:count])
    few = replace(dataset, train=part)
    one, *more = sizes or SIZES
    alone, used = _rate(config, few, device, one, "alone", compiling)
    if alone is None:
        return {way: {} for way in ways}
    rates: dict[Way, dict[int, float]] = {way: {one: alone} for way in ways}
    for way in ways:
        before, size, share = alone, one, used
        for following in more:
            too_many = way == "streams" and following > _MOST_STREAMS
            if stop() or too_many or share * following / size > _MEMORY_SHARE:
                break
            rate, share = _rate(config, few, device, following, way, compiling)
            if rate is None:
                break
            rates[way][following] = rate
            if rate < before:
                break
            before, size = rate, following
    return rates


def _rate(
    config: TrialConfig,
    dataset: Dataset,
    device: torch.device,
    size: int,
    way: Way,
    compiling: Compiling | None,
) -> tuple[float | None, float]:
    """Images a second, None where memory does not suffice, and the share of memory it took.

    A step that cannot be captured with ``train.graph: on`` counts as too little memory as well: for
    one trial it is what its own run will say. So does whatever else torch cannot do for several at
    once: then they train alone.
    """
    used = [0.0]
    try:
        with _memory(device) as used:
            rate = (
                len(dataset.train) * size / _seconds(config, dataset, device, size, way, compiling)
            )
    except (MemoryError, torch.OutOfMemoryError, CaptureError) as error:
        _log.info("%d trials at once (%s) do not fit: %s", size, way, error)
        return None, used[0]
    except (UsageError, RuntimeError) as error:  # UsageError: it cannot be compiled
        if way == "alone":
            raise
        _log.warning("%d trials at once (%s) do not work: %s", size, way, error)
        return None, used[0]
    return rate, used[0]


def _seconds(
    config: TrialConfig,
    dataset: Dataset,
    device: torch.device,
    size: int,
    way: Way,
    compiling: Compiling | None,
) -> float:
    """Seconds of one pass, after one that warms up."""
    lr, how = config.optimizer.lr, compiling if config.train.compile == "on" else None
    if way == "alone":
        engine = Engine(config, dataset=dataset, device=device, compiling=how)
        try:
            return min(
                engine.train(epoch=epoch, lr=lr, before_batch=_nothing).seconds for epoch in (1, 2)
            )
        finally:
            engine.drop_graph()
    if way == "streams":
        with side_by_side([config] * size, dataset=dataset, device=device) as run:
            return min(run(), run())
    cohort = CohortEngine(config, dataset=dataset, device=device, compiling=how)
    try:
        seat = cohort.seat(config)  # one model is built, however many are tried
        cohort.arrange([copy.copy(seat) for _ in range(size)])
        return min(
            cohort.train(epochs=[epoch] * size, lrs=[lr] * size, before_batch=_nothing)[0].seconds
            for epoch in (1, 2)
        )
    finally:
        cohort.drop_graph()


@contextlib.contextmanager
def side_by_side(
    configs: Sequence[TrialConfig], *, dataset: Dataset, device: torch.device
) -> Iterator[Callable[[], float]]:
    """Trains these in lanes of their own, an epoch each, as often as it is called; the seconds."""
    lanes = [Lane[Pass](device) for _ in configs]
    engines: list[Engine] = []

    def run() -> float:
        began = time.perf_counter()
        for lane, engine, config in zip(lanes, engines, configs, strict=True):
            lane.begin(engine.training(epoch=1, lr=config.optimizer.lr))
        all_done(lanes, _nothing)
        return time.perf_counter() - began

    try:
        for lane, config in zip(lanes, configs, strict=True):
            with lane.entered():
                engines.append(Engine(config, dataset=dataset, device=device))
        yield run
    finally:
        for lane in lanes:
            lane.stop()
        for engine in engines:
            engine.drop_graph()


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


def _nothing() -> None:
    pass

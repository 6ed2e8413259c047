"""The rungs of `bench_step.py`: ways to train the same model, each as a function to be timed.

A rung is made once and called often; every call trains on the same number of images and returns
when the device has done it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from sweeper.config import DataShape, TrialConfig
from sweeper.data import Augment, Dataset, Part, Standardize
from sweeper.models import build
from sweeper.training.cohort.engine import CohortEngine
from sweeper.training.cohort.sizing import side_by_side
from sweeper.training.device import synchronize
from sweeper.training.engine import Engine

Rung = Callable[[], float]
"""Seconds of one call."""

_PATIENCE_S = 120.0
"""So long may a process take to start or to train, before it is taken to be lost."""


def images(shape: DataShape, count: int, device: torch.device) -> Dataset:
    """Random images and labels: what they show changes no time."""
    generator = torch.Generator().manual_seed(0)
    size = (count, shape.channels, shape.height, shape.width)
    part = Part(
        images=torch.randint(256, size, generator=generator, dtype=torch.uint8).to(device),
        labels=torch.randint(shape.classes, (count,), generator=generator).to(device),
    )
    return Dataset(
        name="random",
        source="random images",
        shape=shape,
        classes=tuple(str(each) for each in range(shape.classes)),
        train=part,
        val=part,
        test=part,
        standardize=Standardize.fit(part.images, "channel"),
        augment=Augment(()),
        digest="",
    )


def changed(config: TrialConfig, **train: Any) -> TrialConfig:
    """``config`` with other fields of its section ``train``."""
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def shortened(dataset: Dataset, count: int) -> Dataset:
    """The first ``count`` training images."""
    part = Part(images=dataset.train.images[:count], labels=dataset.train.labels[:count])
    return replace(dataset, train=part)


class _Pictures(TorchDataset[Any]):
    """The training images as PIL has them, transformed one by one."""

    def __init__(self, dataset: Dataset) -> None:
        self.pixels = dataset.train.images.permute(0, 2, 3, 1).cpu().numpy()
        self.labels = dataset.train.labels.tolist()
        channels = self.pixels.shape[-1]
        self.transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * channels, (0.25,) * channels),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = Image.fromarray(np.squeeze(self.pixels[index]))
        return self.transform(picture), self.labels[index]


@contextlib.contextmanager
def textbook(
    config: TrialConfig, dataset: Dataset, device: torch.device, loaders: int
) -> Iterator[Rung]:
    """A DataLoader over PIL images, torch's default Adam, float32, the loss read every step."""
    loader = DataLoader(
        _Pictures(dataset),
        batch_size=config.train.batch_size,
        shuffle=True,
        num_workers=loaders,
        persistent_workers=loaders > 0,
        pin_memory=device.type == "cuda",
    )
    model = build(config.model, dataset.shape, seed=0).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> float:
        total, began = 0.0, time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
        return time.perf_counter() - began

    yield run


@contextlib.contextmanager
def alone(config: TrialConfig, dataset: Dataset, device: torch.device) -> Iterator[Rung]:
    """One trial as sweeper trains it: ``train.graph`` and ``train.compile`` say how."""
    engine = Engine(config, dataset=dataset, device=device)
    if config.train.compile != "off":
        print(f"(train.compile: {config.train.compile}: {engine.compiled})", flush=True)

    def run() -> float:
        began = time.perf_counter()
        engine.train(epoch=1, lr=1e-3, before_batch=_nothing)
        return time.perf_counter() - began

    try:
        yield run
    finally:
        engine.drop_graph()


@contextlib.contextmanager
def cohort(
    config: TrialConfig, dataset: Dataset, device: torch.device, trials: int
) -> Iterator[Rung]:
    """So many trials as one batch."""
    engine = CohortEngine(config, dataset=dataset, device=device)
    engine.arrange([engine.seat(changed(config, seed=seed)) for seed in range(trials)])
    told = config.train.compile == "off"

    def run() -> float:
        nonlocal told
        began = time.perf_counter()
        engine.train(epochs=[1] * trials, lrs=[1e-3] * trials, before_batch=_nothing)
        seconds = time.perf_counter() - began
        if not told:
            print(f"(train.compile: on: {engine.compiled})", flush=True)
            told = True
        return seconds

    try:
        yield run
    finally:
        engine.drop_graph()


@contextlib.contextmanager
def streams(
    config: TrialConfig, dataset: Dataset, device: torch.device, trials: int
) -> Iterator[Rung]:
    """So many trials side by side as a worker trains them, each in a lane of its own: with a
    captured step and a stream on a GPU, in turn with the others on a CPU."""
    configs = [changed(config, seed=seed) for seed in range(trials)]
    with side_by_side(configs, dataset=dataset, device=device) as run:
        yield run


@contextlib.contextmanager
def processes(
    config: TrialConfig, dataset: Dataset, device: torch.device, trials: int
) -> Iterator[Rung]:
    """So many trials, each in a process of its own; on a CPU with one thread each."""
    context = multiprocessing.get_context("spawn")
    begin, end = context.Barrier(trials + 1), context.Barrier(trials + 1)
    asked = context.Value("i", 1)
    work = (config.model_dump_json(), dataset.shape, len(dataset.train), str(device))
    crew = [
        context.Process(target=_process, args=(*work, begin, end, asked), daemon=True)
        for _ in range(trials)
    ]

    def run() -> float:
        began = time.perf_counter()
        begin.wait(_PATIENCE_S)
        end.wait(_PATIENCE_S)
        return time.perf_counter() - began

    try:
        for each in crew:
            each.start()
        begin.wait(_PATIENCE_S)  # all are ready
        yield run
        asked.value = 0
        begin.wait(_PATIENCE_S)
    except threading.BrokenBarrierError as error:
        raise RuntimeError("one of the processes failed, see above") from error
    finally:
        begin.abort()
        end.abort()
        for each in crew:
            if each.pid is not None:
                each.join(10)
                each.kill()


def _process(
    config: str, shape: DataShape, count: int, device: str, begin: Any, end: Any, asked: Any
) -> None:
    torch.set_num_threads(1)
    parsed, place = TrialConfig.model_validate_json(config), torch.device(device)
    try:
        with alone(parsed, images(shape, count, place), place) as run:
            run()
            begin.wait(_PATIENCE_S)
            while True:
                begin.wait()  # others may be timed meanwhile
                if not asked.value:
                    return
                run()
                end.wait(_PATIENCE_S)
    except threading.BrokenBarrierError:  # another one failed, or the parent has had enough
        return
    except BaseException:
        begin.abort()
        end.abort()
        raise


def flops(config: TrialConfig, shape: DataShape) -> float:
    """Floating-point operations of one image's training step, as torch counts them."""
    batch = 8
    model = build(config.model, shape, seed=0).train()
    x = torch.zeros(batch, shape.channels, shape.height, shape.width)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops() / batch


def roof(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: what the device can do."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    best = 0.0
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def update_bytes(config: TrialConfig, shape: DataShape) -> float:
    """What AdamW reads and writes a step: weights, gradients and two means, float32."""
    model = build(config.model, shape, seed=0)
    return 2 * 4 * 4.0 * sum(parameter.numel() for parameter in model.parameters())


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, those read and those written."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    return best


def _nothing() -> None:
    pass

"""K models of one structure trained as one: vmap of the forward pass over a [K, P] matrix.

Only the forward pass is under vmap. The loss of a member is a number of its own, and the sum of
them is differentiated once, by the ordinary backward pass, with respect to all members' weights: no
member's gradient holds anything of another's, NaN included (design decision 7).

Shapes: ``K`` slots, ``P`` numbers in a row (`sweeper.training.rows`), ``N`` training images, ``B``
of a batch, ``C`` classes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sweeper.config import TrialConfig
from sweeper.data import Dataset, Part
from sweeper.models import build
from sweeper.models.mixer import by_rows
from sweeper.training.cohort.losses import CohortLoss
from sweeper.training.cohort.noise import MaskedDropout, Noise, rates_of, with_masks
from sweeper.training.cohort.ready import Built, ReadyCohort
from sweeper.training.compiling import Compiling
from sweeper.training.device import repeatable, stream
from sweeper.training.evaluation import evaluation_batch
from sweeper.training.inputs import Inputs, batches_of, drawn_order
from sweeper.training.network import Pass
from sweeper.training.precision import precision_of
from sweeper.training.rows.leaves import Leaves, lowered_parameters
from sweeper.training.rows.numbers import Layout, Numbers, inputs_first
from sweeper.training.rows.optimizer import RowOptimizer, fused_update
from sweeper.training.step import Totals, hits_of
from sweeper.training.turns import Steps, driven, settled

_ATTENTION: Final = {
    "cpu": [SDPBackend.MATH],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}


@dataclass(kw_only=True)
class Seat:
    """What the engine knows of a member: ``numbers`` become views once it is in a slot."""

    config: TrialConfig
    numbers: Numbers
    rates: dict[str, float]


class CohortEngine:
    """The seats of a cohort, trained and evaluated together.

    ``config`` is any member's; all share its structure. ``compiling``: what ``train.compile: auto``
    goes by; without, it compiles nothing. Raises UsageError for a model that does not fit the data,
    and MissingExtraError where ``train.compile: on`` lacks a program.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        dataset: Dataset,
        device: torch.device,
        compiling: Compiling | None = None,
    ) -> None:
        self._config = config
        self._dataset = dataset
        self._device = device
        self.precision = precision_of(config.train, device)
        model = by_rows(self._built(config))
        self.layout = Layout.of(
            model,
            lowered=lowered_parameters(model, self.precision),
            stored=inputs_first(model),
        )
        self.names = tuple(model.state_dict())
        self._noise = Noise(model, precision=self.precision, device=device)
        self._template = _with_wide_norms(with_masks(model))
        self.inputs = self.part(dataset.train, augmented=True)
        count, size = len(self.inputs), config.train.batch_size
        self._full, self._tail = batches_of(count, size)
        self.seats: list[Seat] = []
        self._numbers: Numbers  # and what goes with it: there with the first arrangement
        self._leaves: Leaves
        self._before: Numbers
        self._remembers = False
        self._ready = ReadyCohort(
            config,
            shape=dataset.shape,
            device=device,
            full=self._full,
            step=self._following,
            losses=self._losses,
            undo=self._undo,
            how=compiling,
        )

    @property
    def graph(self) -> str:
        """Whether the common step is a CUDA graph, and if not, why."""
        return self._ready.captured

    @property
    def compiled(self) -> str:
        """Whether the common step is compiled, and if not, why."""
        return self._ready.compiled

    @property
    def is_compiled(self) -> bool:
        """Whether the step is compiled for the slots that there are."""
        return self._ready.is_compiled

    def seat(self, config: TrialConfig) -> Seat:
        """A member before its first step, in no slot yet."""
        model = self._built(config)
        return Seat(
            config=config, numbers=Numbers.initial(model, self.layout), rates=rates_of(model)
        )

    def part(self, part: Part, *, augmented: bool = False) -> Inputs:
        """``part`` of the data set as the models take it."""
        return Inputs(part, dataset=self._dataset, precision=self.precision, augmented=augmented)

    def arrange(self, seats: Sequence[Seat]) -> None:
        """Let ``seats`` be the slots, in this order.

        With as many as before, those that are new take over the slot they stand in, and whatever
        was there is gone; with another number all move to new memory.
        """
        if len(seats) == len(self.seats):
            for k, (new, old) in enumerate(zip(seats, self.seats, strict=True)):
                if new is not old:
                    place = self._numbers.slot(k)
                    place.copy_(new.numbers)
                    new.numbers = place
                    self._remembers = False
            self.seats = list(seats)
            return
        self.drop_graph()
        if not seats:
            self.seats = []
            return
        slots, device = len(seats), self._device
        numbers = Numbers.stacked([seat.numbers for seat in seats])
        before = numbers.copied()
        leaves = self._leaves_of(numbers)
        optimizer = RowOptimizer(
            slots,
            dtype=self.precision.dtype,
            device=device,
            fused=fused_update(device, self.precision.dtype, self.precision.of_products),
        )
        loss = self._loss_of([seat.config for seat in seats])
        totals = Totals(device, slots)
        order_KN = torch.zeros(slots, len(self.inputs), dtype=torch.int64, device=device)
        next_B = torch.zeros(self._config.train.batch_size, dtype=torch.int64, device=device)
        # Until here nothing is lost where memory does not suffice.
        self._numbers, self._leaves, self._optimizer = numbers, leaves, optimizer
        self._loss, self._totals = loss, totals
        self._order_KN, self._next_B = order_KN, next_B
        self._before, self._remembers = before, False
        self.seats = list(seats)
        for k, seat in enumerate(seats):
            seat.numbers = numbers.slot(k)

    def train(
        self, *, epochs: Sequence[int], lrs: Sequence[float], before_batch: Callable[[], None]
    ) -> list[Pass]:
        """Every seat's next epoch, which has its own number and learning rate."""
        with repeatable(self._device):
            return driven(self.training(epochs=epochs, lrs=lrs), before_batch)

    def training(self, *, epochs: Sequence[int], lrs: Sequence[float]) -> Steps[list[Pass]]:
        """As :meth:`train`, with pauses."""
        seeds = [seat.config.train.seed for seat in self.seats]
        self._before.copy_(self._numbers)
        self._leaves.refresh()
        self._remembers = True
        self._configure(lrs)
        self._template.train()
        self._rewind()
        self._ready.prepare(self._built_in())
        counted = list(zip(seeds, epochs, strict=True))
        self._shuffle([stream(seed, "order", epoch) for seed, epoch in counted])
        self._noise.seed([stream(seed, "noise", epoch) for seed, epoch in counted])
        self._totals.clear()
        yield from settled(self._device)
        started = time.perf_counter()
        yield from self._all_batches()
        yield from settled(self._device)
        seconds = time.perf_counter() - started
        return _passes(self._totals, len(self.inputs), seconds)

    def roll_back(self) -> None:
        """Put the numbers of all seats back to where the last epoch began."""
        if self.seats and self._remembers:
            self._numbers.copy_(self._before)

    def evaluation(self, inputs: Inputs) -> Steps[list[Pass]]:
        """Every seat's loss and accuracy on ``inputs``, with pauses."""
        return self._evaluated(self._numbers, self._loss, inputs)

    def evaluate_states(
        self, states: Sequence[tuple[TrialConfig, Mapping[str, Tensor]]], inputs: Inputs
    ) -> list[Pass]:
        """Loss and accuracy on ``inputs`` of any models, each the ``state_dict`` of a member."""
        numbers = Numbers.stacked([Numbers.of_state(state, self.layout) for _, state in states])
        steps = self._evaluated(numbers, self._loss_of([c for c, _ in states]), inputs)
        with repeatable(self._device):
            return driven(steps, lambda: None)

    def drop_graph(self) -> None:
        """Free the CUDA graph; the next epoch captures a new one."""
        self._ready.drop_graph()

    def drop_compiled(self) -> None:
        """Forget what was compiled: the slots need not stay as many any more."""
        self._ready.drop_compiled()

    def _built(self, config: TrialConfig) -> nn.Module:
        model = build(config.model, self._dataset.shape, seed=config.train.seed)
        return model.to(device=self._device, dtype=self.precision.dtype)

    def _leaves_of(self, numbers: Numbers) -> Leaves:
        return Leaves(numbers.weights, self.layout, self.precision.of_products)

    def _loss_of(self, configs: Sequence[TrialConfig]) -> CohortLoss:
        return CohortLoss(
            self._config.train.loss,
            [config.train.label_smoothing for config in configs],
            classes=self._dataset.shape.classes,
            device=self._device,
        )

    def _configure(self, lrs: Sequence[float]) -> None:
        """Bring hyper-parameters to where the step reads them."""
        self._optimizer.configure([seat.config.optimizer for seat in self.seats], lrs)
        self._loss.configure([seat.config.train.label_smoothing for seat in self.seats])
        self._noise.configure([seat.rates for seat in self.seats])
        for size in {self._config.train.batch_size if self._full else 0, self._tail} - {0}:
            self._noise.prepare(size, self._dataset.shape)

    def _shuffle(self, seeds: Sequence[int]) -> None:
        places: dict[int, list[int]] = {}
        for k, seed in enumerate(seeds):
            places.setdefault(seed, []).append(k)
        for seed, rows in places.items():  # most studies have one seed: it is drawn once
            order_N = drawn_order(len(self.inputs), seed).to(self._device)
            for k in rows:
                self._order_KN[k].copy_(order_N)
        self._rewind()

    def _rewind(self) -> None:
        torch.arange(len(self._next_B), out=self._next_B)

    def _all_batches(self) -> Steps[None]:
        for _ in range(self._full):
            yield None
            if self._ready.graph is None:
                self._following()
            else:
                self._ready.graph.replay()
        if self._tail:
            yield None
            self._step(self._order_KN[:, len(self.inputs) - self._tail :])

    def _following(self) -> None:
        """Train on the next full batch, counted on the device."""
        index_KB = self._order_KN[:, self._next_B]
        self._next_B.add_(len(self._next_B))
        self._step(index_KB)

    def _step(self, index_KB: Tensor) -> None:
        """Gather, augment, forward, loss, backward, clip, update, count, for all members."""
        numbers, leaves = self._numbers, self._leaves
        x_KBCHW, labels_KB = self.inputs.take_each(index_KB, self._noise.generators)
        masks = self._noise.masks(index_KB.shape[1])
        dropping = self._noise.dropping
        for name, layer in self._template.named_modules():
            if isinstance(layer, MaskedDropout):
                layer.drops = name in dropping
        full = index_KB.shape[1] == self._config.train.batch_size
        losses = self._ready.losses if full else self._losses  # a rest would be compiled anew
        with self._forward():
            losses_K, hits_K = losses(
                leaves.named, {**numbers.buffers, **masks}, x_KBCHW, labels_KB
            )
        gradient = leaves.gradient(losses_K.sum())
        self._optimizer.update(numbers, gradient, leaves)
        self._totals.add(losses_K, hits_K, labels_KB.shape[1])

    def _losses(
        self,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x_KBCHW: Tensor,
        labels_KB: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Loss [K] and hits [K]: what ``train.compile`` compiles, both passes."""
        logits_KBC = vmap(self._logits)(weights, buffers, x_KBCHW)
        return self._loss(logits_KBC, labels_KB), hits_of(logits_KBC, labels_KB)

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """The context of a forward pass, with kernels for attention that work under vmap.

        A CPU's cannot be batched again. cuDNN's and the memory-efficient one leave out what their
        backward pass needs: under vmap no tensor says that it wants a gradient.
        """
        with self.precision.forward(), sdpa_kernel(_ATTENTION[self._device.type]):
            yield

    def _logits(
        self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x_BCHW: Tensor
    ) -> Any:
        return functional_call(self._template, {**weights, **buffers}, (x_BCHW,))

    @torch.no_grad()
    def _evaluated(self, numbers: Numbers, loss: CohortLoss, inputs: Inputs) -> Steps[list[Pass]]:
        self._template.eval()
        slots = len(numbers.weights)
        totals = Totals(self._device, slots)
        batch = evaluation_batch(self._config.model, self._dataset.shape, self._device, slots=slots)
        forward = vmap(self._logits, in_dims=(0, 0, None))
        leaves = self._leaves_of(numbers)
        started = time.perf_counter()
        for start in range(0, len(inputs), batch):
            yield None
            x_BCHW, labels_B = inputs.span(start, min(start + batch, len(inputs)))
            with self._forward():
                logits_KBC = forward(leaves.named, numbers.buffers, x_BCHW)
            hits_K = hits_of(logits_KBC, labels_B[None])
            totals.add(loss(logits_KBC, labels_B[None]), hits_K, len(labels_B))
        yield from settled(self._device)
        return _passes(totals, len(inputs), time.perf_counter() - started)

    def _built_in(self) -> Built:
        noise, smooths = self._noise, self._loss.smooths
        # Every one that is registered costs a replay two more launches (torch 2.11), drawn or not.
        draws = self.inputs.draws or bool(noise.dropping)
        return Built(
            slots=len(self.seats),
            dropping=frozenset(noise.dropping),
            smooths=smooths,
            captured=(self._optimizer.program, noise.program, smooths),
            generators=noise.generators if draws else (),
        )

    def _undo(self) -> None:
        """Put back what a step on a full batch changes, before the first of an epoch."""
        self.roll_back()
        self._leaves.refresh()
        self._totals.clear()
        self._rewind()


def _with_wide_norms(model: nn.Module) -> nn.Module:
    """``model``, whose norms are given float32 at least.

    Alone, autocast sees to that for layer normalization, but not under vmap. Batch normalization
    takes anything alone; under vmap, on a CPU, only the dtype of its running statistics.
    """

    def widened(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x = inputs[0]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm | nn.modules.batchnorm._BatchNorm):
            layer.register_forward_pre_hook(widened)
    return model


def _passes(totals: Totals, count: int, seconds: float) -> list[Pass]:
    means = totals.means(count)
    return [Pass(loss=loss, accuracy=accuracy, seconds=seconds) for loss, accuracy in means]

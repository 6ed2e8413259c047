"""One model's numbers as a row, and those of several as matrices.

Shapes: ``K`` models, ``P`` numbers in a row, ``Q`` for what is lowered, ``R`` for what is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from sweeper.errors import UsageError

_CPU: Final = torch.device("cpu")
ALIGNED: Final = 16
"""Every parameter begins at a multiple of so many numbers, 32 bytes at least: some kernels are
faster there, and some of cuBLAS's take it for granted."""
LARGE: Final = 2**22
"""From so many numbers on, those of all rows, joining a gradient with the others takes a GPU longer
than a kernel more."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each parameter of a model lies in its flat row, and which buffers it has.

    ``shapes`` are in the model's order. In a row the ``lowered`` come first, which a step reads in
    autocast's dtype. What lies between two parameters is zero and is not trained. ``stored``: the
    order in which a parameter's dimensions lie in a row, where it is not their own.
    """

    shapes: Mapping[str, torch.Size]
    buffers: tuple[str, ...]
    lowered: frozenset[str] = frozenset()
    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        lowered: frozenset[str] = frozenset(),
        stored: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Self:
        """Raises UsageError where a parameter is not trained: a row has no place for those."""
        shapes: dict[str, torch.Size] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                raise UsageError(f"every parameter of a member must be trained, but {name} is not")
            shapes[name] = parameter.shape
        kept = model.state_dict()
        buffers = tuple(name for name in kept if name not in shapes)
        return cls(shapes=shapes, buffers=buffers, lowered=lowered, stored=stored or {})

    @cached_property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(shape.numel() for shape in self.shapes.values())

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each parameter lies, in the order in which they follow each other.

        The largest first; those that leave a gap after them are the last ones of what is lowered,
        and of the rest.
        """

        def later(name: str) -> tuple[bool, bool, int]:
            size = self.shapes[name].numel()
            return name not in self.lowered, size % ALIGNED != 0, -size

        found: dict[str, slice] = {}
        end = 0
        for name in sorted(self.shapes, key=later):
            start = _aligned(end)
            end = start + self.shapes[name].numel()
            found[name] = slice(start, end)
        return found

    @cached_property
    def lowered_size(self) -> int:
        """Q, where in a row the others begin."""
        return _aligned(max((self.places[name].stop for name in self.lowered), default=0))

    @cached_property
    def size(self) -> int:
        """P."""
        return _aligned(max(place.stop for place in self.places.values()))

    def apart(self, rows: int) -> tuple[str, ...]:
        """Parameters at the head of so many rows that are large enough for an update of their own.

        All are lowered and leave no gap.
        """

        def large(name: str) -> bool:
            size = self.shapes[name].numel()
            return name in self.lowered and size % ALIGNED == 0 and size * rows >= LARGE

        return tuple(takewhile(large, self.places))

    def row(self, state: Mapping[str, Tensor]) -> Tensor:
        """The parameters of a ``state_dict`` as a row [P]."""
        zeros = next(iter(state.values())).new_zeros(ALIGNED)
        return torch.cat(self.joined(state, zeros, zeros, rows=torch.Size([])))

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """The parameters in rows [..., P], as views [..., shape], in the model's order."""
        return {name: self.shaped(name, rows[..., self.places[name]]) for name in self.shapes}

    def shaped(self, name: str, part: Tensor) -> Tensor:
        """A parameter [..., shape] as a view of its numbers [..., n]."""
        shape, order = self.shapes[name], self.stored.get(name)
        lead = part.shape[:-1]
        if order is None:
            return part.view(*lead, *shape)
        turned = part.view(*lead, *(shape[dimension] for dimension in order))
        back = (len(lead) + order.index(dimension) for dimension in range(len(shape)))
        return turned.permute(*range(len(lead)), *back)

    def flat(self, name: str, value: Tensor) -> Tensor:
        """The numbers [..., n] of a parameter [..., shape], as they lie in a row."""
        lead = value.dim() - len(self.shapes[name])
        if order := self.stored.get(name):
            value = value.permute(*range(lead), *(lead + dimension for dimension in order))
        return value.reshape(*value.shape[:lead], -1)

    def joined(
        self,
        named: Mapping[str, Tensor],
        lowered_zeros: Tensor,
        kept_zeros: Tensor,
        *,
        rows: torch.Size,
    ) -> tuple[Tensor, Tensor]:
        """Parameters [*rows, shape] as [*rows, Q] and [*rows, R]: what is lowered, and the rest.

        Without those that are not ``named``. What comes between them is taken from ``zeros`` [16 a
        row], of the dtype of each part.
        """
        parts = {name: self.flat(name, named[name]) for name in self.places if name in named}
        lowered = {name: part for name, part in parts.items() if name in self.lowered}
        kept = {name: part for name, part in parts.items() if name not in self.lowered}
        return self._laid(lowered, lowered_zeros, rows), self._laid(kept, kept_zeros, rows)

    def _laid(self, parts: Mapping[str, Tensor], zeros: Tensor, rows: torch.Size) -> Tensor:
        """One after the other. Those with a gap after them are joined by themselves before: in one
        with the others they would all be copied number by number."""
        even: list[Tensor] = []
        odd: list[Tensor] = []
        for name, part in parts.items():
            stop = self.places[name].stop
            if gap := _aligned(stop) - stop:
                odd += [part, zeros[: rows.numel() * gap].view(*rows, gap)]
            else:
                even.append(part)
        joined = [*even, torch.cat(odd, dim=-1)] if odd else even
        return torch.cat(joined, dim=-1) if joined else zeros[:0].view(*rows, 0)


def kernels_like_images(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """``stored`` of a model whose images are channels-last: kernels of convolutions are as well."""
    return {name: (0, 2, 3, 1) for name, each in model.named_parameters() if each.dim() == 4}


def inputs_first(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """``stored`` of a model under vmap: the gradient of a linear layer's weight [out, in] comes out
    of a batched product as [in, out], and need not be turned round then."""
    return {
        f"{name}.weight": (1, 0)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Everything that training changes of one member, or of all of them where stacked to [K, …].

    ``first`` is the momentum of SGD or Adam's average of gradients, ``second`` Adam's average of
    their squares, ``steps`` the steps so far (float64).
    """

    weights: Tensor
    buffers: dict[str, Tensor]
    first: Tensor
    second: Tensor
    steps: Tensor

    @classmethod
    def initial(cls, model: nn.Module, layout: Layout) -> Self:
        """Those of a model before its first step."""
        state = {name: value.detach() for name, value in model.state_dict().items()}
        row_P = layout.row(state)
        return cls(
            weights=row_P,
            buffers={name: state[name].clone() for name in layout.buffers},
            first=torch.zeros_like(row_P),
            second=torch.zeros_like(row_P),
            steps=torch.zeros((), dtype=torch.float64, device=row_P.device),
        )

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], layout: Layout) -> Self:
        """Those of a ``state_dict`` that is only evaluated."""
        row_P = layout.row(state)
        none = row_P.new_empty(0)
        return cls(
            weights=row_P,
            buffers={name: state[name] for name in layout.buffers},
            first=none,
            second=none,
            steps=none,
        )

    @classmethod
    def stacked(cls, members: Sequence[Numbers]) -> Self:
        """[K, …] copies of K members' numbers."""
        return cls(
            weights=torch.stack([each.weights for each in members]),
            buffers={
                name: torch.stack([each.buffers[name] for each in members])
                for name in members[0].buffers
            },
            first=torch.stack([each.first for each in members]),
            second=torch.stack([each.second for each in members]),
            steps=torch.stack([each.steps for each in members]),
        )

    def slot(self, k: int) -> Self:
        """Views of the numbers in slot ``k``."""
        return type(self)(
            weights=self.weights[k],
            buffers={name: value[k] for name, value in self.buffers.items()},
            first=self.first[k],
            second=self.second[k],
            steps=self.steps[k],
        )

    @torch.no_grad()
    def copy_(self, other: Numbers) -> None:
        """Take over the numbers of ``other``, in place."""
        self.weights.copy_(other.weights)
        for name, value in self.buffers.items():
            value.copy_(other.buffers[name])
        self.first.copy_(other.first)
        self.second.copy_(other.second)
        self.steps.copy_(other.steps)

    def copied(self, device: torch.device | None = None) -> Self:
        """Copies with memory of their own, on ``device`` (None: where they are)."""

        def copy(value: Tensor) -> Tensor:
            return value.to(device or value.device, copy=True)

        return type(self)(
            weights=copy(self.weights),
            buffers={name: copy(value) for name, value in self.buffers.items()},
            first=copy(self.first),
            second=copy(self.second),
            steps=copy(self.steps),
        )


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


def model_state(numbers: Numbers, layout: Layout, order: Sequence[str]) -> dict[str, Tensor]:
    """One member's ``state_dict`` of its model, as views, in the model's ``order``."""
    found = {**layout.named(numbers.weights), **numbers.buffers}
    return {name: found[name] for name in order}


@torch.no_grad()
def load_model_state(numbers: Numbers, layout: Layout, state: Mapping[str, Tensor]) -> None:
    """Put a model's ``state_dict`` into one member's numbers, in place."""
    for name, value in layout.named(numbers.weights).items():
        value.copy_(state[name])
    for name, value in numbers.buffers.items():
        value.copy_(state[name])


def optimizer_state(
    numbers: Numbers, layout: Layout, kept: Sequence[str], device: torch.device = _CPU
) -> dict[int, dict[str, Any]]:
    """One model's optimizer state as ``torch.optim`` keeps it, by position of the parameter.

    The copies are on ``device``. ``kept``: its names there, ``momentum_buffer`` of SGD or ``step``,
    ``exp_avg``, ``exp_avg_sq``.
    """
    if not kept:
        return {}
    steps = numbers.steps.to(device, torch.float32)
    series = {
        "momentum_buffer": numbers.first,
        "exp_avg": numbers.first,
        "exp_avg_sq": numbers.second,
    }
    tensors = {name: list(layout.named(series[name]).values()) for name in kept if name != "step"}
    state: dict[int, dict[str, Any]] = {}
    for position in range(len(layout.shapes)):
        state[position] = {
            name: (steps if name == "step" else tensors[name][position]).to(device, copy=True)
            for name in kept
        }
    return state


@torch.no_grad()
def load_optimizer_state(
    numbers: Numbers, layout: Layout, state: Mapping[int, Mapping[str, Any]]
) -> None:
    """Put what ``torch.optim`` keeps into one member's numbers, in place; what it lacks is zero.

    SGD counts no steps, and then it only matters whether there was one.
    """
    numbers.first.zero_()
    numbers.second.zero_()
    numbers.steps.fill_(1 if state else 0)
    first, second = (list(layout.named(row).values()) for row in (numbers.first, numbers.second))
    for position, of_parameter in state.items():
        for name, value in of_parameter.items():
            if not isinstance(value, Tensor):
                continue
            if name in {"momentum_buffer", "exp_avg"}:
                first[position].copy_(value)
            elif name == "exp_avg_sq":
                second[position].copy_(value)
            elif name == "step":
                numbers.steps.copy_(value)

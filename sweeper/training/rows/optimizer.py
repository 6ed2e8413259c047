"""SGD, momentum, Nesterov, Adam and AdamW for K models in one update, each with its own numbers.

The arithmetic and its order are those of torch.optim's single-tensor versions (sgd.py, adam.py),
which take no learning rate a model. What a model's rule does not use is left out with ``where``,
never multiplied by zero: zero times a neighbour's NaN would be no neighbour's, but zero times an
own overflow would.

Shapes: ``K`` slots, ``P`` numbers of one model; ``K1`` is [K, 1], one number a model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

from sweeper.config.optimizer import OptimizerConfig
from sweeper.training.compiling import lacking
from sweeper.training.device import synchronize
from sweeper.training.rows.leaves import Gradient, Leaves
from sweeper.training.rows.numbers import ALIGNED, Layout, Numbers

_log = logging.getLogger(__name__)
FusedUpdate = Callable[[Numbers, Gradient, Leaves, dict[str, Tensor]], None]
"""See `sweeper.training.rows.fused.update`."""

_ADAM_EPS: Final = 1e-8
"""torch.optim's own, for Adam and AdamW."""


def kept_state(config: OptimizerConfig) -> tuple[str, ...]:
    """The names under which ``torch.optim`` keeps what this rule remembers of its steps."""
    if config.name in {"adam", "adamw"}:
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if momentum_of(config) else ()


def momentum_of(config: OptimizerConfig) -> float:
    """Momentum, or beta1, as `sweeper.optim` understands the section."""
    if config.name == "sgd":
        return 0.0
    return 0.9 if config.momentum is None else config.momentum


@dataclass(frozen=True)
class Program:
    """Which operations an update has; a captured one is captured anew where this changes."""

    sgd: bool
    momentum: bool
    nesterov: bool
    adam: bool
    coupled: bool
    decoupled: bool
    clipped: bool


class RowOptimizer:
    """One update of all rows; hyper-parameters lie in tensors that keep their addresses."""

    def __init__(
        self,
        slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fused: FusedUpdate | None = None,
    ) -> None:
        def column(value: float = 0.0, dtype: torch.dtype = dtype) -> Tensor:
            return torch.full((slots, 1), value, dtype=dtype, device=device)

        self._configs: list[OptimizerConfig] = [OptimizerConfig(name="sgd")] * slots
        self._lr = column(dtype=torch.float64)
        self._beta1 = column(dtype=torch.float64)
        self._beta2 = column(dtype=torch.float64)
        self._minus_lr = column()
        self._kept_share = column(1.0)
        self._coupled = column()
        self._momentum = column()
        self._one_less_beta1 = column()
        self._squares_kept = column()
        self._one_less_beta2 = column()
        self._eps = column()
        self._clip_norm = column(math.inf)
        self._unclipped = column(1.0)
        self._is_adam = column(0.0, torch.bool)
        self._is_nesterov = column(0.0, torch.bool)
        self._is_clipped = column(0.0, torch.bool)
        self._fused = fused
        self.program = self._planned()

    def configure(self, configs: Sequence[OptimizerConfig], lrs: Sequence[float]) -> None:
        """Set the hyper-parameters of every slot and the learning rates of the coming epoch."""
        self._configs = list(configs)
        momenta = [momentum_of(each) for each in configs]
        adam = [each.name in {"adam", "adamw"} for each in configs]
        decoupled = [each.name == "adamw" for each in configs]
        decay = [each.weight_decay for each in configs]
        beta2 = [each.beta2 for each in configs]
        clip = [each.clip_norm for each in configs]
        _fill(self._lr, lrs)
        _fill(self._beta1, momenta)
        _fill(self._beta2, beta2)
        _fill(self._minus_lr, [-lr for lr in lrs])
        _fill(
            self._kept_share,
            [1 - lr * w if off else 1.0 for lr, w, off in zip(lrs, decay, decoupled, strict=True)],
        )
        _fill(self._coupled, [0.0 if off else w for w, off in zip(decay, decoupled, strict=True)])
        _fill(self._momentum, momenta)
        _fill(self._one_less_beta1, [1 - beta for beta in momenta])
        _fill(self._squares_kept, beta2)
        _fill(self._one_less_beta2, [1 - beta for beta in beta2])
        _fill(self._eps, [_ADAM_EPS if each.eps is None else each.eps for each in configs])
        _fill(self._clip_norm, [math.inf if norm is None else norm for norm in clip])
        _fill(self._is_adam, adam)
        _fill(self._is_nesterov, [each.name == "nesterov" for each in configs])
        _fill(self._is_clipped, [norm is not None for norm in clip])
        self.program = self._planned()

    def _planned(self) -> Program:
        names = {each.name for each in self._configs}
        return Program(
            sgd=bool(names & {"sgd", "momentum", "nesterov"}),
            momentum=any(
                momentum_of(each) and each.name in {"momentum", "nesterov"}
                for each in self._configs
            ),
            nesterov="nesterov" in names,
            adam=bool(names & {"adam", "adamw"}),
            coupled=any(each.weight_decay and each.name != "adamw" for each in self._configs),
            decoupled="adamw" in names,
            clipped=any(each.clip_norm is not None for each in self._configs),
        )

    @torch.no_grad()
    def update(self, numbers: Numbers, gradient: Gradient, leaves: Leaves) -> None:
        """One step of every row, in place, ``leaves`` included."""
        numbers.steps.add_(1)
        share_K1 = self._share(gradient) if self.program.clipped else self._unclipped
        if self._fused is not None:
            self._fused(numbers, gradient, leaves, {**self._columns(), "clip_share": share_K1})
            return
        gradient_KP = gradient.whole()
        if self.program.clipped:
            gradient_KP.mul_(share_K1)
        self._unfused(numbers, gradient_KP)
        leaves.refresh()

    def _unfused(self, numbers: Numbers, gradient_KP: Tensor) -> None:
        program, weights_KP = self.program, numbers.weights
        if program.coupled:
            gradient_KP = torch.addcmul(gradient_KP, weights_KP, self._coupled)
        if program.decoupled:
            weights_KP.mul_(self._kept_share)
        if not program.sgd:
            self._adam(numbers, gradient_KP)
        elif not program.adam:
            self._sgd(numbers, gradient_KP)
        else:
            self._either(numbers, gradient_KP)

    def _columns(self) -> dict[str, Tensor]:
        """The hyper-parameters that the fused update reads."""
        return {
            "lr": self._lr,
            "beta1": self._beta1,
            "beta2": self._beta2,
            "minus_lr": self._minus_lr,
            "kept_share": self._kept_share,
            "coupled": self._coupled,
            "momentum": self._momentum,
            "one_less_beta1": self._one_less_beta1,
            "squares_kept": self._squares_kept,
            "one_less_beta2": self._one_less_beta2,
            "eps": self._eps,
            "is_adam": self._is_adam,
            "is_nesterov": self._is_nesterov,
        }

    def _share(self, gradient: Gradient) -> Tensor:
        """What ``clip_grad_norm_`` multiplies each row's gradient by."""
        norms = [
            torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=self._eps.dtype)
            for part in gradient.parts()
        ]
        norm_K1 = torch.linalg.vector_norm(torch.cat(norms, dim=1), dim=1, keepdim=True)
        share_K1 = torch.clamp(self._clip_norm / (norm_K1 + 1e-6), max=1.0)
        return torch.where(self._is_clipped, share_K1, self._unclipped)

    def _sgd(self, numbers: Numbers, gradient_KP: Tensor) -> None:
        """A momentum of zeros acts as none does on the first step."""
        direction_KP = gradient_KP
        if self.program.momentum:
            direction_KP = numbers.first.mul_(self._momentum).add_(gradient_KP)
        if self.program.nesterov:
            ahead_KP = torch.addcmul(gradient_KP, direction_KP, self._momentum)
            direction_KP = torch.where(self._is_nesterov, ahead_KP, direction_KP)
        numbers.weights.addcmul_(direction_KP, self._minus_lr)

    def _adam(self, numbers: Numbers, gradient_KP: Tensor) -> None:
        steps_K1 = numbers.steps[:, None]
        dtype = gradient_KP.dtype
        minus_size_K1 = (-self._lr / (1 - self._beta1**steps_K1)).to(dtype)
        root_K1 = (1 - self._beta2**steps_K1).sqrt().to(dtype)
        numbers.first.lerp_(gradient_KP, self._one_less_beta1)
        numbers.second.mul_(self._squares_kept)
        numbers.second.addcmul_(self._one_less_beta2 * gradient_KP, gradient_KP)
        denominator_KP = numbers.second.sqrt().div_(root_K1).add_(self._eps)
        numbers.weights.addcdiv_(minus_size_K1 * numbers.first, denominator_KP)

    def _either(self, numbers: Numbers, gradient_KP: Tensor) -> None:
        """Every row by its own rule: both are worked out, and one is taken."""
        other = numbers.copied()
        self._sgd(other, gradient_KP)
        second_KP = numbers.second.clone()
        self._adam(numbers, gradient_KP)
        numbers.weights.copy_(torch.where(self._is_adam, numbers.weights, other.weights))
        if self.program.momentum:
            numbers.first.copy_(torch.where(self._is_adam, numbers.first, other.first))
        numbers.second.copy_(torch.where(self._is_adam, numbers.second, second_KP))


@cache
def fused_update(
    device: torch.device, dtype: torch.dtype, lowered: torch.dtype
) -> FusedUpdate | None:
    """The update as one kernel: on CUDA, where Triton can build it for these dtypes. Else None.

    The first call builds it, and says in the log what keeps it from working.
    """
    if device.type != "cuda" or lacking(device):
        return None
    try:
        from sweeper.training.rows import fused

        _try(fused.update, device, dtype, lowered)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "out of memory" in str(error):  # there may be some another time
            raise torch.OutOfMemoryError(str(error)) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        _log.warning("weights are updated by operations of torch: no kernel for that: %s", reason)
        return None
    return fused.update


def _try(
    update: FusedUpdate, device: torch.device, dtype: torch.dtype, lowered: torch.dtype
) -> None:
    """Update a small row: what is built for it does for any."""
    shapes = dict.fromkeys(("first", "second"), torch.Size([ALIGNED]))
    names = frozenset({"first"} if lowered is not dtype else ())
    layout = Layout(shapes=shapes, buffers=(), lowered=names)
    blank = torch.zeros(1, layout.size, dtype=dtype, device=device)
    steps = torch.zeros(1, dtype=torch.float64, device=device)
    numbers = Numbers(weights=blank, buffers={}, first=blank, second=blank, steps=steps)
    leaves = Leaves(blank, layout, lowered)
    gradient = Gradient(
        lowered=leaves.lowered.clone(), kept=blank[:, layout.lowered_size :].contiguous()
    )
    RowOptimizer(1, dtype=dtype, device=device, fused=update).update(numbers, gradient, leaves)
    synchronize(device)


def _fill(column_K1: Tensor, values: Sequence[float]) -> None:
    column_K1.copy_(torch.tensor(values, dtype=torch.float64)[:, None])

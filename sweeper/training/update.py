"""What a training step does to the weights: by torch's optimizers, or in rows.

In rows (`sweeper.training.rows`) all weights are updated by one kernel, and a forward pass under
autocast casts none of them. torch's own fused optimizers give a block of threads 65,536 numbers:
for a small model 70 to 80 µs of a step on an H100, as most of it is idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sweeper.config import TrialConfig
from sweeper.optim import make_optimizer, set_lr
from sweeper.training.precision import Precision, widen_convolutions
from sweeper.training.rows import fits
from sweeper.training.rows.leaves import Leaves, lowered_parameters
from sweeper.training.rows.numbers import (
    Layout,
    Numbers,
    kernels_like_images,
    load_optimizer_state,
    optimizer_state,
)
from sweeper.training.rows.optimizer import FusedUpdate, RowOptimizer, fused_update, kept_state
from sweeper.training.state import optimizer_state as torch_optimizer_state
from sweeper.training.state import restore_optimizer


class Update(Protocol):
    """``weights`` are what a forward pass is given of those that are trained, by name."""

    weights: Mapping[str, Tensor]

    def logits(self, weights: Mapping[str, Tensor], x_BCHW: Tensor) -> Tensor:
        """What the model makes of images, ``[B, classes]``."""

    def begin(self, lr: float) -> None:
        """Set the learning rate, and read the weights anew, whoever has changed them."""

    def apply(self, loss: Tensor) -> None:
        """Backward pass, clipping, update."""

    def forget_gradients(self) -> None:
        """Free them; the next backward pass then writes gradients instead of adding to them."""

    def why_eager(self) -> str | None:
        """Why a step cannot be captured, or None."""

    def state(self, device: torch.device) -> dict[str, Any]:
        """What the optimizer and the scaling of losses remember, copied to ``device``."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put :meth:`state` back, in place; the model has its weights already."""


def make_update(
    model: nn.Module,
    config: TrialConfig,
    *,
    precision: Precision,
    memory_format: torch.memory_format,
) -> Update:
    """The update of ``model``, whose parameters may become views of other memory, and whose
    convolutions may be widened."""
    if in_rows(config, precision):
        return RowUpdate(model, config, precision=precision, memory_format=memory_format)
    widen_convolutions(model, precision)  # not in rows, whose weights come in bfloat16
    return TorchUpdate(model, config, precision=precision)


def in_rows(config: TrialConfig, precision: Precision) -> bool:
    """Whether a trial of this configuration is updated in rows: on a GPU, where that can be."""
    return fits(config) and _fused(precision) is not None


def _fused(precision: Precision) -> FusedUpdate | None:
    device = torch.device(precision.device_type)
    return fused_update(device, precision.dtype, precision.of_products)


class TorchUpdate:
    """By an optimizer of torch's, with loss scaling where float16 needs it."""

    def __init__(self, model: nn.Module, config: TrialConfig, *, precision: Precision) -> None:
        self.weights: Mapping[str, Tensor] = {}  # the model has them
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(
            config.optimizer,
            self._parameters,
            capturable=precision.device_type == "cuda" and config.train.graph != "off",
        )
        self.scaler = precision.scaler()
        self._clip_norm = config.optimizer.clip_norm

    def logits(self, weights: Mapping[str, Tensor], x_BCHW: Tensor) -> Tensor:
        """See :meth:`Update.logits`."""
        logits_BK: Tensor = self._model(x_BCHW)
        return logits_BK

    def begin(self, lr: float) -> None:
        """See :meth:`Update.begin`."""
        set_lr(self.optimizer, lr)

    def apply(self, loss: Tensor) -> None:
        """See :meth:`Update.apply`."""
        self.forget_gradients()
        if self.scaler is None:
            torch.autograd.backward(loss)
            self._clip()
            self.optimizer.step()
            return
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def forget_gradients(self) -> None:
        """See :meth:`Update.forget_gradients`."""
        for parameter in self._parameters:
            parameter.grad = None

    def why_eager(self) -> str | None:
        """See :meth:`Update.why_eager`."""
        optimizer_skips = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if self.scaler is not None and not optimizer_skips:
            return "loss scaling for float16 waits for the device, unless the optimizer is fused"
        return None

    def state(self, device: torch.device) -> dict[str, Any]:
        """See :meth:`Update.state`."""
        return {
            "optimizer": torch_optimizer_state(self.optimizer, device),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Update.restore`."""
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _clip(self) -> None:
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)


class RowUpdate:
    """As the only row of a matrix, whose parts the parameters of ``model`` become.

    What is remembered has the format of torch's optimizers: a trial may go on with either.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrialConfig,
        *,
        precision: Precision,
        memory_format: torch.memory_format,
    ) -> None:
        self._model, self._config = model, config.optimizer
        self._layout = layout = Layout.of(
            model,
            lowered=lowered_parameters(model, precision, (nn.Linear, nn.Conv2d)),
            stored=kernels_like_images(model) if memory_format is torch.channels_last else {},
        )
        # Views, no copies. The model keeps its own buffers.
        row = Numbers.initial(model, layout)
        self._numbers = Numbers(
            weights=row.weights[None],
            buffers={},
            first=row.first[None],
            second=row.second[None],
            steps=row.steps[None],
        )
        for name, view in layout.named(self._numbers.weights[0]).items():
            parent, _, of_layer = name.rpartition(".")
            setattr(model.get_submodule(parent), of_layer, nn.Parameter(view))
        self._leaves = Leaves(self._numbers.weights, layout, precision.of_products, alone=True)
        device = self._numbers.weights.device
        self._optimizer = RowOptimizer(
            1, dtype=precision.dtype, device=device, fused=_fused(precision)
        )
        self.weights: Mapping[str, Tensor] = self._leaves.named

    def logits(self, weights: Mapping[str, Tensor], x_BCHW: Tensor) -> Tensor:
        """See :meth:`Update.logits`."""
        logits_BK: Tensor = functional_call(self._model, dict(weights), (x_BCHW,))
        return logits_BK

    def begin(self, lr: float) -> None:
        """See :meth:`Update.begin`."""
        self._optimizer.configure([self._config], [lr])
        self._leaves.refresh()

    def apply(self, loss: Tensor) -> None:
        """See :meth:`Update.apply`."""
        gradient = self._leaves.gradient(loss)
        self._optimizer.update(self._numbers, gradient, self._leaves)

    def forget_gradients(self) -> None:
        """Nothing keeps them."""

    def why_eager(self) -> str | None:
        """See :meth:`Update.why_eager`."""
        return None

    def state(self, device: torch.device) -> dict[str, Any]:
        """See :meth:`Update.state`."""
        kept = kept_state(self._config)
        state = optimizer_state(self._numbers.slot(0), self._layout, kept, device)
        return {"optimizer": state, "scaler": {}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Update.restore`."""
        load_optimizer_state(self._numbers.slot(0), self._layout, state["optimizer"])
        self._leaves.refresh()

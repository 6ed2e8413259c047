"""A CUDA device that is not there: the shapes, dtypes and devices of tensors, without their values.

torch's fake tensors go the way of real ones on CUDA: nearly the same kernels are chosen (attention
is the plain one), every operation says which dtype and device its result has, and where tensors of
two devices meet it raises. So does whatever needs a value on the host. Only the backward pass asks
for a real device; it is left out, and gradients are blank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from sweeper.training import evaluation, ready, update
from sweeper.training.capture import CaptureError
from sweeper.training.cohort import engine as cohort_engine
from sweeper.training.cohort import ready as cohort_ready
from sweeper.training.rows import fits

CUDA = torch.device("cuda", 0)


class FakeCuda(FakeTensorMode):
    """Tensors have no values in here. What is made and asked for in a step has to stay on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self._stepping = False
        self.operations: list[str] = []

    def __deepcopy__(self, memo: object) -> FakeCuda:
        return self  # a copied tensor is on the same device

    @contextmanager
    def step(self) -> Iterator[None]:
        """The host must not wait in here: no value is read, and nothing goes to or from it."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default and not self._stepping:
            return getattr(args[0], "answer", 1)  # any number will do to set up
        known = _WITHOUT_SHAPES.get(func.overloadpacket)
        if known is None:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        else:
            result = known(*args)
        if func in _ANSWERS:
            result.answer = _ANSWERS[func]
        if self._stepping and func is not torch.ops.prim.device.default:
            self._look_at(str(func), (args, kwargs, result))
        return result

    def _look_at(self, name: str, tree: Any) -> None:
        self.operations.append(name)
        for tensor in _pytree.tree_leaves(tree):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.device != CUDA:
                raise AssertionError(f"{name} has a tensor {list(tensor.shape)} on {tensor.device}")


def _updated(*lists: list[Tensor]) -> None:
    """A fused optimizer's kernel, which takes one device and one dtype."""
    of_parameters = [tensor for each in lists[:3] for tensor in each]
    assert len({(tensor.dtype, tensor.device) for tensor in of_parameters}) == 1


def _dropped(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)


_aten = torch.ops.aten
_WITHOUT_SHAPES = {
    _aten._fused_sgd_: _updated,
    _aten._fused_adam_: _updated,
    _aten._fused_adamw_: _updated,
    _aten._fused_dropout: _dropped,
}
"""Kernels of which torch does not know what they return."""


_ANSWERS = {_aten.lt.Scalar: False, _aten.ge.Scalar: True}
"""What an optimizer asks of its learning rate and zero."""


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Let torch and sweeper take the device for one that is there."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(nn.Module, "_apply", _applied)
    cpu = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: cpu())
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.default_generator,))
    # Triton's compiler wants a real device; the operations that its kernel does are seen instead
    monkeypatch.setattr(update, "in_rows", lambda config, _: fits(config))
    for module in (update, cohort_engine):
        monkeypatch.setattr(module, "fused_update", lambda *_: None)
    for module in (ready, cohort_ready):
        monkeypatch.setattr(module, "CapturedStep", _no_graph)
    for module in (evaluation, cohort_engine):
        monkeypatch.setattr(module, "settled", lambda _: iter(()))
    with FakeCuda() as device:
        yield device


def _no_graph(*_: Any, **__: Any) -> None:
    raise CaptureError("there is no device")


def _applied(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """``nn.Module._apply``, which cannot exchange the values of fake parameters."""
    for child in module.children():
        _applied(child, change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            changed = change(parameter.detach())
            module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module

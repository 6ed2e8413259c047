"""One kernel for the update of all rows on a CUDA device, written in Triton.

The rules of `sweeper.training.rows.optimizer`, in its order, but every number is read and written
once a step: 28 bytes a weight with Adam, where one operation after the other moves some 200. A
fused Adam of torch's takes one learning rate for all, and one for each row would leave most of a
GPU idle. The last bits may be rounded otherwise: a product and a sum are one operation here, and in
float32 a division and a root are what the chip has for them.

Whoever imports this loads Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import triton
from torch import Tensor
from triton import language as tl

from sweeper.training.rows.leaves import Gradient, Leaves
from sweeper.training.rows.numbers import Numbers

_BLOCK: Final = 1024


@triton.jit  # type: ignore[untyped-decorator] # no types there
def _update(  # type: ignore[no-untyped-def] # Triton's own language
    weights,
    lowered,
    lowered_gradient,
    kept_gradient,
    first,
    second,
    steps,
    lr,
    beta1,
    beta2,
    minus_lr,
    kept_share,
    coupled,
    momentum,
    one_less_beta1,
    squares_kept,
    one_less_beta2,
    eps,
    is_adam,
    is_nesterov,
    clip_share,
    start,
    stop,
    gradient_width,
    size,
    lowered_size,
    block: tl.constexpr,
):
    """Blocks of the weights of one model a program: axis 0 is the block, axis 1 the model.

    Those from ``start`` to before ``stop``. The first ``lowered_size`` numbers of each model have a
    copy in another dtype, and a gradient in it: ``lowered_gradient`` has ``gradient_width`` numbers
    a model, from ``start`` on.
    """
    k = tl.program_id(1)
    row = k.to(tl.int64)
    column = start + tl.program_id(0) * block + tl.arange(0, block)
    inside = column < stop
    is_lowered = inside & (column < lowered_size)
    at = row * size + column
    at_lowered = row * lowered_size + column
    at_gradient = row * gradient_width + column - start
    at_kept = row * (size - lowered_size) + column - lowered_size
    w = tl.load(weights + at, mask=inside)
    g = tl.load(lowered_gradient + at_gradient, mask=is_lowered, other=0.0).to(w.dtype)
    g = g + tl.load(kept_gradient + at_kept, mask=inside & (column >= lowered_size), other=0.0)
    g = g * tl.load(clip_share + k)
    decay = tl.load(coupled + k)
    if decay != 0:
        g = g + w * decay
    w = w * tl.load(kept_share + k)
    m = tl.load(first + at, mask=inside)
    if tl.load(is_adam + k) != 0:
        v = tl.load(second + at, mask=inside)
        step = tl.load(steps + k)
        unbiased1 = 1 - tl.exp(step * tl.log(tl.load(beta1 + k)))
        unbiased2 = 1 - tl.exp(step * tl.log(tl.load(beta2 + k)))
        minus_size = (-tl.load(lr + k) / unbiased1).to(w.dtype)
        root = tl.sqrt(unbiased2).to(w.dtype)
        share = tl.load(one_less_beta1 + k)
        if share < 0.5:  # as torch's lerp  # noqa: SIM108
            m = m + share * (g - m)
        else:
            m = g - (g - m) * (1 - share)
        v = v * tl.load(squares_kept + k) + tl.load(one_less_beta2 + k) * g * g
        w = w + minus_size * m / (tl.sqrt(v) / root + tl.load(eps + k))
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
    else:
        kept = tl.load(momentum + k)
        direction = g
        if kept != 0:
            direction = m * kept + g
            tl.store(first + at, direction, mask=inside)
            if tl.load(is_nesterov + k) != 0:
                direction = g + direction * kept
        w = w + direction * tl.load(minus_lr + k)
    tl.store(weights + at, w, mask=inside)
    tl.store(lowered + at_lowered, w.to(lowered.dtype.element_ty), mask=is_lowered)


def update(
    numbers: Numbers, gradient: Gradient, leaves: Leaves, columns: Mapping[str, Tensor]
) -> None:
    """One step of every model, in place; ``steps`` counts it already.

    ``columns`` [K, 1] are the hyper-parameters, by the names that the kernel has for them. The
    lowered copy in ``leaves`` is written as well.
    """
    weights_KP = numbers.weights
    slots, size = weights_KP.shape
    settings: dict[str, Any] = {name: column.contiguous() for name, column in columns.items()}
    kept = _somewhere(gradient.kept.contiguous(), weights_KP)
    start = 0
    for part in (*gradient.apart, gradient.lowered):
        width = part.shape[1]
        stop = size if part is gradient.lowered else start + width
        if start == stop:  # all of it was apart
            break
        _update[(triton.cdiv(stop - start, _BLOCK), slots)](
            weights=weights_KP,
            lowered=_somewhere(leaves.lowered, weights_KP),
            lowered_gradient=_somewhere(part.contiguous(), weights_KP),
            kept_gradient=kept,
            first=numbers.first,
            second=numbers.second,
            steps=numbers.steps,
            start=start,
            stop=stop,
            gradient_width=width,
            size=size,
            lowered_size=leaves.layout.lowered_size,
            block=_BLOCK,
            enable_fp_fusion=True,  # Triton 3.10 will not do it unasked
            **settings,
        )
        start = stop


def _somewhere(part: Tensor, other: Tensor) -> Tensor:
    """A part without numbers has no address; nothing is read or written there."""
    return part if part.numel() else other

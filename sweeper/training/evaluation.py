"""Loss and accuracy of a model on a part of the data that it does not train on."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from sweeper.config import DataShape, ModelConfig
from sweeper.config.model import Timm
from sweeper.optim import Loss
from sweeper.training.inputs import Inputs
from sweeper.training.precision import Precision
from sweeper.training.step import Totals, hits_of
from sweeper.training.turns import Steps, settled

_VALUES_A_BATCH: Final = {"cpu": 2**18, "cuda": 2**24}
_LARGEST_BATCH: Final = 4096


def evaluation_batch(
    model: ModelConfig, shape: DataShape, device: torch.device, *, slots: int = 1
) -> int:
    """How many images to evaluate at once: by their size, whatever the training batch is.

    A batch holds about 2**24 input values on a GPU and 2**18 on a CPU, where larger ones leave
    the cache and gain nothing. ``slots`` models that look at the same images share that.
    """
    side = model.image_size if isinstance(model, Timm) else None
    pixels = side * side if side else shape.height * shape.width
    fitting = _VALUES_A_BATCH.get(device.type, 2**18) // (shape.channels * pixels)
    return max(1, min(_LARGEST_BATCH, fitting // slots))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    inputs: Inputs,
    *,
    loss: Loss,
    precision: Precision,
    batch: int,
) -> Steps[tuple[float, float]]:
    """Mean loss and accuracy over all of ``inputs``; ``model`` is left in evaluation mode.

    The loss is the one that is trained on, label smoothing included.
    """
    model.eval()
    device = next(model.parameters()).device
    totals = Totals(device)
    for start in range(0, len(inputs), batch):
        yield None
        x_BCHW, labels_B = inputs.span(start, min(start + batch, len(inputs)))
        with precision.forward():
            logits_BK = model(x_BCHW)
        totals.add(loss(logits_BK, labels_B), hits_of(logits_BK, labels_B), len(labels_B))
    yield from settled(device)
    (means,) = totals.means(len(inputs))
    return means

"""The ``train`` section: how long, in which batches, against which loss, with which seed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sweeper.config.base import Section

Switch = Literal["auto", "on", "off"]


class TrainConfig(Section):
    """How one trial is trained.

    ``epochs`` is how often every training image is seen. ``batch_size`` is the number of images a
    step. ``label_smoothing`` is the share of a target spread over all classes. ``seed`` decides
    initial weights, order of the images, augmentation and dropout.
    ``loss: mse`` is the mean squared error against one-hot targets. ``precision: auto`` is
    bfloat16 autocast on CUDA and float32 elsewhere. ``graph`` captures the step as one CUDA
    graph. ``compile`` runs it through ``torch.compile``: ``auto`` only where that was measured to
    repay here, by the number of steps with the same shapes in the study; with ``on`` a trial that
    cannot be compiled fails. Those that train as one batch are compiled together, which on a GPU is
    where it gives most. Both change speed, and results only by rounding.
    ``layer_statistics`` adds mean and standard deviation of every layer's weights and gradients
    to each epoch's measurement.
    """

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=128, ge=1)
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    graph: Switch = "auto"
    compile: Switch = "off"
    layer_statistics: bool = False

"""From a part of a data set on the device to batches the model takes.

Shapes: ``N`` images of a part, ``B`` of a batch, ``K`` trials, ``C`` channels,
``H`` x ``W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sweeper.data import Dataset, Part, Standardize
from sweeper.data.standardize import KEPT_BYTES
from sweeper.training.device import noise_generator
from sweeper.training.precision import Precision


class Inputs:
    """Images and labels of one part: gathered, augmented, standardized, in the model's dtype.

    Everything here runs on the device without waiting for it, and can be captured in a CUDA graph.
    """

    def __init__(
        self,
        part: Part,
        *,
        dataset: Dataset,
        precision: Precision,
        augmented: bool,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._images_NCHW = part.images
        self._labels_N = part.labels
        self._dtype = precision.dtype
        self._memory_format = memory_format
        self._standardize: nn.Module | None = dataset.standardize
        self._augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
        self._whitens = dataset.standardize.whitening is not None
        self._generator = noise_generator(part.images.device)
        if augmented and not dataset.augment.identity:
            self._augment = dataset.augment
        elif _fits(part.images, self._dtype):
            self._images_NCHW = self._standardized(part, dataset.standardize)
            self._standardize = None

    def __len__(self) -> int:
        return len(self._labels_N)

    @property
    def kept_standardized(self) -> bool:
        """True where the part was standardized once, False where every batch is."""
        return self._standardize is None

    @property
    def draws(self) -> bool:
        """Whether a batch needs random numbers."""
        return self._augment is not None

    def take(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """The images ``[B, C, H, W]`` and labels ``[B]`` of these positions."""
        images_BCHW = self._images_NCHW.index_select(0, index_B)
        return self._ready(images_BCHW), self._labels_N.index_select(0, index_B)

    def take_each(
        self, index_KB: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """The images ``[K, B, C, H, W]`` and labels ``[K, B]`` of K trials' positions.

        Each trial's images are augmented from a generator of its own, as :meth:`take` augments
        them from the device's.
        """
        index = index_KB.reshape(-1)
        x = self._images_NCHW.index_select(0, index)
        if self._augment is not None:
            trials = zip(torch.split(x, index_KB.shape[1]), generators, strict=True)
            x = torch.cat([self._augment(part, generator) for part, generator in trials])
        if self._standardize is not None:
            # one trial's at a time: whitening is a product whose last bits depend on its height
            parts = torch.split(x, index_KB.shape[1] if self._whitens else len(x))
            x = torch.cat([self._standardize(part).to(self._dtype) for part in parts])
        labels = self._labels_N[index]  # index_select takes a GPU three times as long for so many
        return x.view(*index_KB.shape, *x.shape[1:]), labels.view(index_KB.shape)

    def span(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The images ``[B, C, H, W]`` and labels ``[B]`` from ``start`` to before ``stop``."""
        return self._ready(self._images_NCHW[start:stop]), self._labels_N[start:stop]

    def _ready(self, x_BCHW: Tensor) -> Tensor:
        if self._augment is not None:
            x_BCHW = self._augment(x_BCHW, self._generator)
        if self._standardize is not None:
            x_BCHW = self._standardize(x_BCHW).to(self._dtype)
        if self._memory_format is not torch.contiguous_format:
            x_BCHW = x_BCHW.contiguous(memory_format=self._memory_format)
        return x_BCHW

    def _standardized(self, part: Part, standardize: Standardize) -> Tensor:
        """The whole part; from what all workers of the machine share, where there is such."""
        if part.standardized is not None and self._dtype is torch.float32:
            return part.standardized()
        return standardize.whole(part.images, self._dtype)


def _fits(images_NCHW: Tensor, dtype: torch.dtype) -> bool:
    return images_NCHW.numel() * dtype.itemsize <= KEPT_BYTES.get(images_NCHW.device.type, 0)


def batches_of(count: int, batch_size: int) -> tuple[int, int]:
    """How many full batches an epoch has, and how many images the last one has beside them."""
    full, tail = divmod(count, batch_size)
    return (full - 1, batch_size + 1) if tail == 1 and full else (full, tail)


def drawn_order(count: int, seed: int) -> Tensor:
    """The order ``[N]`` that an epoch's seed gives, on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class Order:
    """The order of an epoch's images, cut into batches.

    ``full`` batches have ``batch_size`` images, and the ``tail`` has what is left, so that every
    image is trained on once an epoch. A single left-over image joins the batch before it, because
    batch normalization cannot normalize one image.
    """

    def __init__(self, count: int, *, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.full, self.tail = batches_of(count, batch_size)
        self._order_N = torch.arange(count, device=device)
        self._next_B = torch.arange(batch_size, device=device)

    def shuffle(self, seed: int) -> None:
        """Draw the order anew. Drawn on the CPU: a seed means the same order on every device."""
        self._order_N.copy_(drawn_order(len(self._order_N), seed))
        self.rewind()

    def rewind(self) -> None:
        """Let :meth:`following_B` start again with the first batch."""
        torch.arange(self.batch_size, out=self._next_B)

    def batches(self) -> list[Tensor]:
        """The positions of every full batch, ``[batch_size]`` each."""
        if not self.full:
            return []
        return list(torch.split(self._order_N[: self.full * self.batch_size], self.batch_size))

    def rest(self) -> Tensor:
        """The positions of the tail, ``[tail]``."""
        return self._order_N[self.full * self.batch_size :]

    def following(self) -> Tensor:
        """The positions of the next full batch, counted on the device: for a CUDA graph."""
        index_B = self._order_N.index_select(0, self._next_B)
        self._next_B.add_(self.batch_size)
        return index_B

"""What a trial needs of a data set, from the files that all workers of a machine map.

======================= ================================================================
kind of file            what it depends on
======================= ================================================================
``parts``               the source's files and how a section draws from them
``statistics``          the parts, what they are cut to, the kind of standardisation
``train``, ``val`` …    the statistics; a part as floats, where it is kept so on a CPU
======================= ================================================================

Each is made when it is first asked for, and floats when they are asked for again: on CUDA, or where
images are augmented, there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sweeper.config.data import DataConfig
from sweeper.data.dataset import Part
from sweeper.data.drawn import Drawn, drawn, drawn_by
from sweeper.data.raw import Origin
from sweeper.data.shared import Content, SharedFolder
from sweeper.data.standardize import Standardize
from sweeper.data.transforms import centre_crop


def shared_parts(config: DataConfig, origin: Origin, shared: SharedFolder) -> Drawn:
    """The parts that ``config`` draws from ``origin``, which is read where they are not shared yet.

    Raises what reading and drawing raise.
    """
    key = {"origin": origin.digest, **drawn_by(config)}
    content = shared.get("parts", key, lambda: drawn(config, origin.read()).content())
    return Drawn.of(content)


def shared_standardization(
    config: DataConfig, shared: SharedFolder, made: Drawn
) -> tuple[Standardize, Drawn]:
    """How ``made`` is standardized on a CPU, and ``made`` with what all workers share of that."""
    size = (made.shape.height, made.shape.width)
    key = {
        "data": made.digest,
        "size": size,
        "standardize": config.standardize,
        # their last bits may follow these
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }

    def statistics() -> Content:
        train_NCHW = centre_crop(made.parts["train"].images, size)
        return Content(
            tensors=dict(Standardize.fit(train_NCHW, config.standardize).named_buffers())
        )

    standardize = Standardize.restored(shared.get("statistics", key, statistics).tensors)
    parts = {
        name: replace(
            part,
            standardized=_Standardized(
                shared=shared, name=name, key=key, part=part, by=standardize, again=not made.new
            ),
        )
        for name, part in made.parts.items()
    }
    return standardize, replace(made, parts=parts)


@dataclass(kw_only=True, eq=False)
class _Standardized:
    """A part as floats. ``again``: somebody has had these data before.

    Data that only one trial ever has, such as a split of its own, are not worth a file four times
    as large: the first trial standardizes for itself, the second one shares.
    """

    shared: SharedFolder
    name: str
    key: Mapping[str, Any]
    part: Part
    by: Standardize
    again: bool
    _mapped: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._mapped is not None:
            return self._mapped
        if not self.again:
            self.again = True
            return self._made().tensors["images"]
        content = self.shared.get(self.name, self.key, self._made)
        if content.mapped:
            self._mapped = content.tensors["images"]
        return content.tensors["images"]

    def _made(self) -> Content:
        return Content(tensors={"images": self.by.whole(self.part.images, torch.float32)})

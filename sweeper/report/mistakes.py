"""What the best model gets wrong: the confusion matrix, and its surest mistakes as pictures."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from sweeper.report.blocks import Figure, Gallery
from sweeper.report.drawing import layout, numbers, plain
from sweeper.report.model import BestModel, Predictions
from sweeper.report.pictures import picture
from sweeper.report.wording import plural

_MISTAKES: Final = 24
_THUMB_PX: Final = 112
_LEAST_SIDE_PX: Final = 4
_COUNTS_UP_TO: Final = 20
_CLASSES_AT_MOST: Final = 200


def confusion(model: BestModel, said: Predictions) -> Figure | None:
    """How often each class was taken for which, or None for too many classes to read."""
    classes = model.dataset.classes
    if len(classes) > _CLASSES_AT_MOST:
        return None
    matrix_KK = confusion_matrix(said, len(classes))
    share_KK = matrix_KK / np.maximum(matrix_KK.sum(1, keepdims=True), 1)
    names = [plain(name) for name in classes]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": [numbers(row) for row in share_KK.tolist()],
        "text": [[f"{count:,}" if count else "" for count in row] for row in matrix_KK.tolist()],
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "rgba(59,130,196,0)"], [0.05, "rgba(59,130,196,0.35)"], [1, "#3b82c4"]],
        "showscale": False,
        "hovertemplate": "%{y} taken for %{x}:<br>%{text} images, %{z:.1%} of the class"
        "<extra></extra>",
    }
    if len(classes) <= _COUNTS_UP_TO:
        trace["texttemplate"] = "%{text}"
    drawn = layout(x="predicted class", y="true class")
    drawn["xaxis"] |= {"type": "category", "side": "bottom", "showgrid": False}
    drawn["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    right = int(matrix_KK.trace())
    seen = len(said.label_n)
    part = f"of {seen:,} test images"
    if seen < said.total:
        part = f"of {seen:,} of the {said.total:,} test images, drawn at random for lack of time"
    return Figure(
        name="confusion",
        title="Confusion matrix",
        caption=f"{right:,} {part} right: {right / seen:.4f}. Colour: share of the true class.",
        spec={"data": [trace], "layout": drawn},
        height_px=max(360, min(900, 120 + 32 * len(classes))),
        least_width_px=360 if len(classes) <= _COUNTS_UP_TO else 20 * len(classes),
    )


def confusion_matrix(said: Predictions, classes: int) -> NDArray[np.int64]:
    """[true class, predicted class]: how many images."""
    matrix_KK = np.zeros((classes, classes), np.int64)
    np.add.at(matrix_KK, (said.label_n, said.predicted_n), 1)
    return matrix_KK


def worst_mistakes(model: BestModel, said: Predictions) -> Gallery | None:
    """The test images of which the model was surest and wrong; None where all were right, or
    where the data are no images."""
    wrong_n = np.flatnonzero(said.label_n != said.predicted_n)
    test = model.dataset.test
    if len(wrong_n) == 0 or min(test.images.shape[-2:]) < _LEAST_SIDE_PX:
        return None
    worst = wrong_n[np.argsort(-said.confidence_n[wrong_n], kind="stable")][:_MISTAKES]
    classes = model.dataset.classes
    pictures = []
    for place in worst:
        image_CHW = test.images[int(said.index_n[place])]
        scale = 255 if image_CHW.dtype == torch.uint8 else 1
        true, taken = classes[said.label_n[place]], classes[said.predicted_n[place]]
        pictures.append(
            picture(
                (image_CHW.float() / scale).numpy(),
                f"test image {said.index_n[place]}: {true}, taken for {taken}",
                lines=(
                    f"true: {true}",
                    f"predicted: {taken}",
                    f"{100 * said.confidence_n[place]:.1f} %",
                ),
                width_px=_THUMB_PX,
            )
        )
    return Gallery(
        title="Worst mistakes",
        caption=f"The {plural(len(pictures), 'test image')} of {len(wrong_n):,} wrong ones of "
        "which the model was surest, with the probability that it gave to its answer.",
        pictures=tuple(pictures),
        small=True,
    )

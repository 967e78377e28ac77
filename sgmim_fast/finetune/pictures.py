"""Draws predictions of a fine-tuned model beside the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from sgmim_fast.data.pictures import save, visible

_WHITE = 1.0


class Panel(NamedTuple):
    """An image with prediction and ground truth, on the CPU."""

    image: Tensor  # (3, H, W) normalised
    guess: Tensor | None  # (1, h, w) metres, or (classes, h, w) logits
    truth: Tensor  # (1, h, w) metres, NaN = missing; or (h, w) labels, 255 = ignored


def grid(
    panels: list[Panel],
    path: Path,
    title: str,
    classes: int | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> None:
    """Draws one row per image: the image, the prediction, and the ground truth, which is white at missing values.

    Args:
        classes: number of classes. None: depth, on the scale of the row's ground truth; near is bright.
        mean, std: mean and standard deviation with which the images were normalised.
    """
    columns = ["image", "truth"] if panels[0].guess is None else ["image", "predicted", "truth"]
    figure = Figure((2.4 * len(columns), 1.9 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), len(columns), squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        shown = [visible(panel.image, mean, std).permute(1, 2, 0).numpy()]
        if classes is None:
            shown += _depth(panel)
        else:
            guess = [] if panel.guess is None else [panel.guess.argmax(0).numpy()]
            shown += [_labels(labels, classes) for labels in (*guess, panel.truth.numpy())]
        for axis, picture in zip(row, shown, strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    for axis, label in zip(axes[0], columns, strict=True):
        axis.set_title(label, fontsize=9)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def _depth(panel: Panel) -> list[np.ndarray]:
    truth = panel.truth[0].numpy()
    known = truth[np.isfinite(truth)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    maps = [truth] if panel.guess is None else [panel.guess[0].numpy(), truth]
    colours = matplotlib.colormaps["inferno_r"]
    return [
        np.where(np.isfinite(depth)[..., None], colours((depth - low) / max(high - low, 1e-6))[..., :3], _WHITE)
        for depth in maps
    ]


def _labels(labels: np.ndarray, classes: int) -> np.ndarray:
    # consecutive classes get distant colours
    colours = matplotlib.colormaps["turbo"]((np.arange(classes) * 0.381966) % 1)[:, :3]
    return np.where((labels < classes)[..., None], colours[np.minimum(labels, classes - 1)], _WHITE)

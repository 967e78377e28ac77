"""Draws items of a data set, to check by eye that images and maps match. Also has helpers that all figures share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import matplotlib
import matplotlib.colors
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from sgmim_fast.data.pair import Item
from sgmim_fast.data.report import DataError
from sgmim_fast.data.structure_kind import DEPTH, Depth, StructureKind

MISSING = "magenta"  # a colour that the colour map does not contain
MISSING_RGB = torch.tensor(matplotlib.colors.to_rgb(MISSING))[:, None, None]
ACROSS = 4  # pairs per row of the figure


def sheet(
    dataset: Dataset | Sequence[Item],
    path: str | os.PathLike[str],
    count: int = 8,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    kind: StructureKind = DEPTH,
) -> None:
    """Draws images beside their structure maps, missing values in magenta.

    Args:
        dataset: map-style (draws `count` evenly spaced items) or iterable (draws the first `count` items).
        path: path of the figure; the suffix selects the format.
        count: number of pairs.
        mean, std: mean and standard deviation with which the images were normalised.
        kind: kind of the structure maps.

    Raises:
        DataError: there are no pairs.
    """
    if isinstance(dataset, IterableDataset):
        items = list(islice(dataset, count))
    else:
        indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
        items = [dataset[int(index)] for index in indices]
    if not items:
        raise DataError("nothing to draw: the data set has no pairs")
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=MISSING)
    across, down = min(ACROSS, len(items)), -(-len(items) // ACROSS)
    figure = Figure((4 * across, 2.2 * down), layout="constrained")
    axes = figure.subplots(down, 2 * across, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, item in zip(axes.reshape(-1, 2), items, strict=False):
        axis[0].imshow(visible(item["image"].as_subclass(Tensor), mean, std).permute(1, 2, 0).numpy())
        axis[0].set_title(item["name"][-40:], fontsize=7)
        if "structure" not in item:
            continue
        structure = item["structure"].as_subclass(Tensor)
        if isinstance(kind, Depth):  # each map has its own colour scale
            axis[1].imshow(np.ma.masked_invalid(structure[0].numpy()), cmap=colours, interpolation="nearest")
        else:
            picture = kind.colours(kind.standardize(structure[None])[0])[0]
            absent = ~structure.isfinite().all(0)
            axis[1].imshow(picture.where(~absent, MISSING_RGB).permute(1, 2, 0).numpy(), interpolation="nearest")
        missing = float((~structure.isfinite()).float().mean())
        axis[1].set_title(f"{missing:.0%} missing" if missing else "", fontsize=7)
    save(figure, path)


def visible(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Converts normalised images (..., C, H, W) to displayable ones, (..., 3, H, W) in [0, 1].

    The normalisation of three channels is undone. Of more channels the first three are shown, of fewer the first one in
    grey; 0 to 1 then spans 2.5 standard deviations on either side of the mean."""
    if image.shape[-3] == 3:
        return (image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    shown = image[..., :3, :, :] if image.shape[-3] > 3 else image[..., :1, :, :].expand(*image.shape[:-3], 3, -1, -1)
    return (shown / 5 + 0.5).clamp(0, 1)


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 100) -> None:
    """Saves a figure, and creates its folder if needed. Texts are drawn as they are, without matplotlib's formulas,
    since names of files may contain "$"; bytes of a name that are not UTF-8 are drawn as "?"."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(text.get_text().encode(errors="replace").decode())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)

"""The masks of a step, from the seed and the step alone: those of its images, whichever process has them."""

from __future__ import annotations

import torch

from sgmim_fast.masking import SelectiveMask, selective_mask
from sgmim_fast.rows import Rows
from sgmim_fast.train.config import Mask
from sgmim_fast.train.order import mix


def draw(settings: Mask, size: int, images: int, seed: int, step: int, device: torch.device) -> SelectiveMask:
    """Masks of all images of a step, on the device; nothing waits for it.

    Args:
        size: pixels along an image, a multiple of the mask unit.
        images: number of images of the step, over all processes.
    """
    generator = torch.Generator(device).manual_seed(mix(seed, 2, step))
    return selective_mask(
        images, size // settings.unit, settings.ratio, generator=generator, shown=read_shown(settings.shown)
    )


def part(mask: SelectiveMask, first: int, count: int) -> SelectiveMask:
    """The masks of `count` images from the `first` on. All images have as many masked cells, so nothing is searched."""
    images, cells = mask.mask.shape[0], mask.mask[0].numel()

    def rows(all_rows: Rows) -> Rows:
        each = all_rows.index.shape[0] // images
        index = all_rows.index[first * each : (first + count) * each] - first * cells
        return Rows(index, all_rows.offsets[: count + 1])

    own = slice(first, first + count)
    masked, same = rows(mask.masked), mask.shown is mask.masked
    values = mask.mask[own]
    shown = values if same else mask.structure[own]
    return SelectiveMask(values, shown, rows(mask.visible), masked, masked if same else rows(mask.shown))


def read_shown(text: str) -> str | float:
    """The setting `mask.shown` as `selective_mask` takes it."""
    try:
        return float(text)
    except ValueError:
        return text

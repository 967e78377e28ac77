"""The masks of a step, from the seed and the step alone: those of its images, whichever process has them."""

from __future__ import annotations

import warnings

import torch

from sgmim_fast.engine.order import mix
from sgmim_fast.masking import SelectiveMask, selective_mask
from sgmim_fast.pretrain.config import Mask


def draw(
    settings: Mask, size: int, images: int, seed: int, step: int, device: torch.device, stride: int | None = None
) -> SelectiveMask:
    """Masks of all images of a step, on the device; nothing waits for it.

    Args:
        size: pixels along an image, a multiple of the mask unit.
        images: number of images of the step, over all processes.
        stride: pixels along the encoder's cells, on which the masks are drawn where they make up the units.
    """
    generator = torch.Generator(device).manual_seed(mix(seed, 2, step))
    return selective_mask(
        images,
        size // settings.unit,
        settings.ratio,
        generator=generator,
        shown=read_shown(settings.shown),
        scale=1 if stride is None or settings.unit % stride else settings.unit // stride,
    )


def part(mask: SelectiveMask, first: int, count: int) -> SelectiveMask:
    warnings.warn("masks.part(mask, first, count) is now mask.part(first, count)", DeprecationWarning, stacklevel=2)
    return mask.part(first, count)


def read_shown(text: str) -> str | float:
    """The setting `mask.shown` as `selective_mask` takes it."""
    try:
        return float(text)
    except ValueError:
        return text

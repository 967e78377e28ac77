"""Draws masks on salient units of images: SBAM and its adaptive ratio, AMR (arXiv 2404.08327).

SPEC "Salience-based masking".
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sgmim_fast.ops.selective_mask import first_of
from sgmim_fast.rows import Rows

# values of a third-party port; the paper's text does not give them
RATIO, SPREAD, THRESHOLD = 0.75, 0.10, 0.5
ADAPTIVE = ("image", "batch", "none")


@torch.no_grad()
def salience_of(encoder: nn.Module, images: Tensor) -> Tensor:
    """Returns the salience of every patch, (B, H / p, W / p), by the encoder's method `salience`.

    Raises:
        TypeError: the encoder has no method `salience`.
    """
    salience = getattr(encoder, "salience", None)
    if salience is None:
        raise TypeError(
            f"masking='salience' with a {type(encoder).__name__}, which has no method salience; expected one of "
            "sgmim_fast.create_encoder, or of your own with salience(images) -> (B, H / p, W / p)"
        )
    return salience(images)


def masked_counts(salience: Tensor, units: int, ratio: float, spread: float, threshold: float, adaptive: str) -> Tensor:
    """Computes the number of masked units of each image, ceil(ratio of the image * units), (B,) int64.

    `salience` is (B, h, w), of patches.
    """
    share = (salience > threshold).flatten(1).double().mean(1)
    ratios = ratio + spread * (2 * share - 1)  # exactly `ratio` if half of the patches are salient
    if adaptive == "batch":
        ratios = ratios.mean().expand_as(ratios)
    return (ratios * units).ceil().long()


def draw(
    salience: Tensor,
    grid: tuple[int, int],
    scale: int,
    *,
    ratio: float = RATIO,
    spread: float = SPREAD,
    threshold: float = THRESHOLD,
    adaptive: str = "image",
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Rows, Rows]:
    """Draws a mask. Returns it with its visible and masked rows, as `ops.selective_mask` does.

    See `sgmim_fast.selective_mask` for the arguments.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it, its value and what is expected.
    """
    _check(salience, grid, ratio, spread, threshold, adaptive, noise)
    images, (rows, columns) = salience.shape[0], grid
    of_units = salience.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).mean((2, 4)).flatten(1)
    if noise is None:
        noise = torch.rand(of_units.shape, generator=generator, device=salience.device, dtype=torch.float32)
    lost = salience.flatten(1).isnan().any(1)
    if adaptive == "none":
        if salience.device.type == "cuda":
            torch._assert_async(~lost.any(), "salience is NaN")
        elif lost.any():
            _refuse(lost.tolist())
        counts = [math.ceil(ratio * rows * columns)] * images
    else:
        counts = masked_counts(salience, rows * columns, ratio, spread, threshold, adaptive)
        counts, lost = torch.stack((counts, lost.long())).tolist()  # synchronises, once
        _refuse(lost)
    order = (of_units + noise / 2).argsort(dim=1, descending=True, stable=True)
    mask, visible, visible_offsets, masked_rows, masked_offsets = first_of(order, counts, rows, columns, scale)
    return mask, Rows(visible, visible_offsets), Rows(masked_rows, masked_offsets)


def _refuse(lost: list[Any]) -> None:
    if any(lost):
        images = ", ".join(str(image) for image, yes in enumerate(lost) if yes)
        raise ValueError(
            f"salience is NaN in image {images}; expected numbers from 0 to 1: the image or the encoder's stem holds "
            "NaN or infinities, or its tokens are too long for their dtype"
        )


def _check(
    salience: Tensor,
    grid: tuple[int, int],
    ratio: float,
    spread: float,
    threshold: float,
    adaptive: str,
    noise: Tensor | None,
) -> None:
    if not isinstance(salience, Tensor) or not salience.is_floating_point():
        came = f"of dtype {salience.dtype}" if isinstance(salience, Tensor) else f"a {type(salience).__name__}"
        raise TypeError(f"salience is {came}; expected a floating-point tensor (B, h, w) of patches")
    rows, columns = grid
    if salience.ndim != 3 or 0 in salience.shape or salience.shape[1] % rows or salience.shape[2] % columns:
        raise ValueError(
            f"salience has shape {tuple(salience.shape)}; expected (B, h, w), multiples of the grid {tuple(grid)}"
        )
    if adaptive not in ADAPTIVE:
        raise ValueError(f"adaptive is {adaptive!r}; expected one of {', '.join(ADAPTIVE)}")
    if not isinstance(ratio, Real):
        raise TypeError(f"ratio is {ratio!r}; expected one number with masking='salience', which has its own per image")
    least, most = (ratio, ratio) if adaptive == "none" else (ratio - spread, ratio + spread)
    if not 0 <= least <= most <= 1:
        raise ValueError(f"ratio is {ratio} and spread {spread}; expected 0 <= ratio - spread and ratio + spread <= 1")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a number between 0 and 1, as salience is")
    if noise is not None and (
        tuple(noise.shape) != (salience.shape[0], rows * columns) or noise.device != salience.device
    ):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)} on {noise.device}; expected "
            f"{(salience.shape[0], rows * columns)} on {salience.device}, a number for each image and unit"
        )
    if noise is not None and not noise.is_floating_point():
        raise TypeError(f"noise has dtype {noise.dtype}; expected a floating-point dtype")
    if noise is not None and noise.device.type == "cpu" and noise.isnan().any():
        raise ValueError("noise has NaN; expected numbers from 0 to 1")

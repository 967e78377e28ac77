"""Fixed sine-cosine positions of a grid of tokens, as in MAE (arXiv 2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(grid: tuple[int, int], width: int, prefix: int = 0, device: torch.device | None = None) -> Tensor:
    """Returns positions (prefix + rows * columns, width), float64. They are 0 for the prefix; for each cell, row-major,
    sines and cosines of its column (first half) and row (second half) at frequencies 10000^(-4 i / width).

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width is {width}; expected a multiple of 4, for sine-cosine positions")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) * 4 / width)
    down, across = (torch.arange(side, dtype=torch.float64, device=device)[:, None] * frequencies for side in grid)
    halves = [torch.cat([angle.sin(), angle.cos()], 1) for angle in (across, down)]
    table = torch.cat([halves[0].repeat(grid[0], 1), halves[1].repeat_interleave(grid[1], 0)], 1)
    return torch.cat([table.new_zeros(prefix, width), table])

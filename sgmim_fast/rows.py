"""Packed rows: indices of the rows of a batch, with the offsets of each image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Ascending indices of rows of an (images * cells, ...) tensor.

    Images may have different numbers of rows; image b has `index[offsets[b]:offsets[b + 1]]`.
    """

    index: Tensor  # (n,) int64, image * cells + cell
    offsets: Tensor  # (images + 1,) int64, from 0 to n

    def on(self, grid: tuple[int, int], finer: tuple[int, int]) -> Rows:
        """Returns the rows of the same area on a finer grid, which divides each cell into down x across.

        They are computed from `index`, in ascending order, without a mask and without synchronising.

        Args:
            grid: number of cells (rows, columns) of an image on the grid of `index`.
            finer: number of cells (rows, columns) of the result, multiples of `grid`.
        """
        if grid == finer:
            return self
        down, across = finer[0] // grid[0], finer[1] // grid[1]
        device = self.index.device
        # A cell becomes `down` segments of `across` finer cells. Segments of its neighbours come between them, hence
        # the sort.
        first = torch.add(self.index, self.index // grid[1], alpha=(down - 1) * grid[1])
        segments = torch.add(first[:, None], torch.arange(down, device=device), alpha=grid[1]).view(-1).sort().values
        index = torch.add(torch.arange(across, device=device), segments[:, None], alpha=across)
        return Rows(index.view(-1), self.offsets * (down * across))

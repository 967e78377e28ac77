"""Packed rows: which rows of a batch take part, and where each image's begin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of a (images * cells, ...) tensor, ascending, those of one image side by side.

    Images may have different numbers of rows; image b has `index[offsets[b]:offsets[b + 1]]`.
    """

    index: Tensor  # (n,) int64, image * cells + cell
    offsets: Tensor  # (images + 1,) int64, from 0 to n

    def on(self, grid: tuple[int, int], finer: tuple[int, int]) -> Rows:
        """The rows of a grid as those of a finer one, which divides each cell into down x across.

        Computed from the list: no mask is read, and nothing waits for the device.

        Args:
            grid: cells (rows, columns) of an image that `index` counts.
            finer: cells wanted, multiples of `grid`.
        """
        if grid == finer:
            return self
        down, across = finer[0] // grid[0], finer[1] // grid[1]
        device, n = self.index.device, self.index.shape[0]
        line = self.index // grid[1]  # of cells, through all images
        begin = torch.searchsorted(line, line)  # where the line's cells begin in the list
        length = torch.searchsorted(line, line, right=True) - begin
        # A cell becomes `down` segments of `across` finer cells. In the list, the line's first segments come first.
        below = torch.arange(down, device=device)
        segment = torch.add(self.index, line, alpha=(down - 1) * grid[1])[:, None] + below * grid[1]
        first = torch.add(torch.arange(n, device=device), begin, alpha=down - 1)
        place = torch.addcmul(first[:, None], length[:, None], below)
        segments = torch.empty_like(segment).view(-1).scatter_(0, place.view(-1), segment.view(-1))
        index = torch.add(torch.arange(across, device=device), segments[:, None], alpha=across)
        return Rows(index.view(-1), self.offsets * (down * across))

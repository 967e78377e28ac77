"""Packed rows: which rows of a batch take part, and where each image's begin."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Rows of a (images * cells, ...) tensor, ascending, those of one image side by side.

    Images may have different numbers of rows; image b has `index[offsets[b]:offsets[b + 1]]`.
    """

    index: Tensor  # (n,) int64, image * cells + cell
    offsets: Tensor  # (images + 1,) int64, from 0 to n

"""`selective_mask` on the CPU: csrc/cpu/selective_mask.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgmim_fast.ops.selective_mask import sizes


def forward(
    seed: Tensor, masked: Sequence[int], gh: int, gw: int, scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, visible, masked_rows = sizes(masked, gh, gw, scale)
    offsets = len(masked) + 1
    results = (
        torch.empty(shape, dtype=torch.bool),
        torch.empty(visible, dtype=torch.int64),
        torch.empty(offsets, dtype=torch.int64),
        torch.empty(masked_rows, dtype=torch.int64),
        torch.empty(offsets, dtype=torch.int64),
    )
    torch.ops.sgmim_fast_cpu.selective_mask(seed.contiguous(), masked, gh, gw, scale, *results)
    return results

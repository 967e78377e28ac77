"""`gather_patches` on the CPU: csrc/cpu/gather_patches.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    size = args[0].element_size()
    return size in (1, 2, 4, 8), f"elements of {size} bytes ({args[0].dtype}); expected 1, 2, 4 or 8"


def forward(pixels: Tensor, rows: Tensor, cell: int, patch: int, zorder: bool) -> Tensor:
    side = cell // patch
    out = torch.empty(rows.shape[0] * side * side, pixels.shape[1] * patch * patch, dtype=pixels.dtype)
    torch.ops.sgmim_fast_cpu.gather_patches(pixels, rows.contiguous(), out, cell, patch, zorder)
    return out


def backward(grad: Tensor, rows: Tensor, shape: list[int], cell: int, patch: int, zorder: bool) -> Tensor:
    out = torch.zeros(shape, dtype=grad.dtype)
    torch.ops.sgmim_fast_cpu.gather_patches_backward(grad.contiguous(), rows.contiguous(), out, cell, patch, zorder)
    return out

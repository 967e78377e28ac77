"""`gather_patches` on an NVIDIA GPU: csrc/cuda/gather_patches.cu."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(pixels: Tensor, rows: Tensor, cell: int, patch: int, zorder: bool) -> Tensor:
    """Cost: reads and writes the wanted pixels once, 16 bytes at a time where both lie so; 1 launch."""
    side = cell // patch
    shape = rows.shape[0] * side * side, pixels.shape[1] * patch * patch
    out = torch.empty(shape, dtype=pixels.dtype, device=pixels.device)
    torch.ops.sgmim_fast_cuda.gather_patches(pixels, rows.contiguous(), out, cell, patch, zorder)
    return out


def backward(grad: Tensor, rows: Tensor, shape: list[int], cell: int, patch: int, zorder: bool) -> Tensor:
    """Cost: fills the map, then reads and writes the wanted pixels once; 1 launch and a fill."""
    out = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    torch.ops.sgmim_fast_cuda.gather_patches_backward(grad.contiguous(), rows.contiguous(), out, cell, patch, zorder)
    return out

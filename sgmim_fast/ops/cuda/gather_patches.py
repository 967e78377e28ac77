"""`gather_patches` on NVIDIA GPUs: csrc/cuda/gather_patches.cu."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(pixels: Tensor, rows: Tensor, cell: int, patch: int, zorder: bool) -> Tensor:
    """Cost: reads and writes the selected pixels once, 16 bytes at a time if both are aligned; 1 launch."""
    side = cell // patch
    shape = rows.shape[0] * side * side, pixels.shape[1] * patch * patch
    out = torch.empty(shape, dtype=pixels.dtype, device=pixels.device)
    torch.ops.sgmim_fast_cuda.gather_patches(pixels, rows.contiguous(), out, cell, patch, zorder)
    return out


def backward(grad: Tensor, rows: Tensor, shape: list[int], cell: int, patch: int, zorder: bool) -> Tensor:
    """Cost: reads the selected pixels and writes every pixel once, 16 bytes at a time if both are aligned; 1 launch."""
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    inverse = torch.empty(shape[0] * (shape[2] // cell) * (shape[3] // cell), dtype=torch.int64, device=grad.device)
    sizes = cell, patch, zorder
    torch.ops.sgmim_fast_cuda.gather_patches_backward(grad.contiguous(), rows.contiguous(), inverse, out, *sizes)
    return out

"""`selective_mask` on NVIDIA GPUs: csrc/cuda/selective_mask.cu."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops.selective_mask import sizes

MOST_UNITS = 1 << 14


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    _, _, gh, gw, scale = args
    if gh * gw > MOST_UNITS:
        return False, f"{gh * gw} units per image; the CUDA kernel holds at most {MOST_UNITS} in shared memory"
    return gh * gw * scale**2 < 2**31, "2^31 cells per image or more"


def forward(
    seed: Tensor, masked: Sequence[int], gh: int, gw: int, scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cost: writes mask, rows and offsets; 1 launch, and a copy of the offsets if the images' counts differ."""
    device, batch = seed.device, len(masked)
    shape, visible, masked_rows = sizes(masked, gh, gw, scale)
    same = len(set(masked)) == 1
    if same:
        masked_offsets = torch.empty(batch + 1, dtype=torch.int64, device=device)
    else:  # from page-locked memory, so that the copy does not synchronise
        starts = accumulate((count * scale**2 for count in masked), initial=0)
        pinned = torch.tensor(list(starts), dtype=torch.int64, pin_memory=device.type == "cuda")
        masked_offsets = pinned.to(device, non_blocking=True)
    results = (
        torch.empty(shape, dtype=torch.bool, device=device),
        torch.empty(visible, dtype=torch.int64, device=device),
        torch.empty(batch + 1, dtype=torch.int64, device=device),
        torch.empty(masked_rows, dtype=torch.int64, device=device),
        masked_offsets,
    )
    torch.ops.sgmim_fast_cuda.selective_mask(seed.contiguous(), masked[0] if same else -1, gh, gw, scale, *results)
    return results

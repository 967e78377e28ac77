"""`standardize_structure` on NVIDIA GPUs: csrc/cuda/standardize_structure.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops.standardize_structure import raise_if_any

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint16)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    structure = args[0]
    if structure.dtype not in _DTYPES:
        return False, f"dtype {structure.dtype}; the CUDA kernel takes {', '.join(str(d)[6:] for d in _DTYPES)}"
    return structure[0, 0].numel() < 2**31 - 4096, "a map of 2^31 - 4096 values or more"


def forward(structure: Tensor, ignore: bool) -> Tensor:
    """Cost: reads each map once if it fits in shared memory (H100: 224x224 float32), else six times; 1 launch."""
    x = structure.reshape(structure.shape[0] * structure.shape[1], -1).contiguous()
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    nonfinite = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    torch.ops.sgmim_fast_cuda.standardize_structure(x, y, nonfinite)
    if not ignore:
        raise_if_any(nonfinite, structure.shape[1])
    return y.view(structure.shape)

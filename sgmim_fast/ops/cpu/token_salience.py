"""`token_salience` on the CPU: csrc/cpu/token_salience.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops.token_salience import stretched


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    return args[0].dtype != torch.float64, "dtype torch.float64; the C++ kernel works on float32"


def forward(x: Tensor) -> Tensor:
    x = x.to(torch.float32).contiguous()
    sums = torch.empty(x.shape[:2], dtype=torch.float64)
    torch.ops.sgmim_fast_cpu.token_salience(x, sums)
    return stretched(sums).float()

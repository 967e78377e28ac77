"""`token_salience` on the CPU: csrc/cpu/token_salience.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    return args[0].dtype != torch.float64, "dtype torch.float64; the C++ kernel works on float32"


def forward(x: Tensor) -> Tensor:
    x = x.to(torch.float32).contiguous()
    salience = torch.empty(x.shape[:2], dtype=torch.float32)
    torch.ops.sgmim_fast_cpu.token_salience(x, salience)
    return salience

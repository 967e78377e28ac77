"""`standardize_structure` on the CPU: csrc/cpu/standardize_structure.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops.standardize_structure import planes, raise_if_any


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    return args[0].dtype != torch.float64, "dtype torch.float64; the C++ kernel works on float32"


def forward(structure: Tensor, ignore: bool) -> Tensor:
    x = planes(structure)
    y = torch.empty_like(x)
    nonfinite = torch.empty(x.shape[0], dtype=torch.int64)
    torch.ops.sgmim_fast_cpu.standardize_structure(x, y, nonfinite)
    if not ignore:
        raise_if_any(nonfinite, structure.shape[1])
    return y.view(structure.shape)

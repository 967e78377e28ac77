"""`linear_l1` on the CPU: library products, and csrc/cpu/linear_l1.cpp for everything at the pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops import products
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.linear_l1 import input_gradient, operand, target_gradient

NATIVE = (torch.float32, torch.bfloat16)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    x, dtype = args[0] if part == "forward" else args[1], args[-1]
    wanted = dtype or x.dtype
    return wanted in NATIVE, f"dtype {wanted}; the C++ kernels take float32 and bfloat16"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    cell: int,
    packed: bool,
    scale: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]]:
    xs = operand(x, rows, packed, dtype)
    copies = products.copies([weight], xs.dtype)
    prediction = products.linear(xs, *(copies or [weight]), bias)
    signs = torch.empty(prediction.shape, dtype=torch.int8)
    total = torch.empty((), dtype=torch.float64)
    valid = None if valid is None else valid.contiguous()
    torch.ops.sgmim_fast_cpu.l1(prediction, rows.contiguous(), target.float(), valid, cell, signs, total)
    return (total * scale).float(), [signs, *copies]


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    saved: list[Tensor],
    rows: Tensor,
    cell: int,
    packed: bool,
    scale: float,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    signs, *copies = saved
    xs, grad = operand(x, rows, packed, dtype), grad * scale
    scale = float(grad)
    # In float32 the scalar goes into the operand for nothing; in bfloat16 it would be rounded there, so it waits.
    early, late = (scale, None) if xs.dtype == torch.float32 else (1.0, scale)
    s = torch.empty(signs.shape, dtype=xs.dtype)
    sums = torch.empty(signs.shape[1])
    torch.ops.sgmim_fast_cpu.expand_signs(signs, early, s, sums)
    grads = [absent(x) for _ in needs]
    if needs[0]:
        dx = products.linear_input_gradient(s, *(copies or [weight]))
        grads[0] = input_gradient(dx if late is None else dx.float().mul_(late), x, rows, packed)
    if needs[1]:
        dweight = products.linear_weight_gradient(s, xs)
        grads[1] = (dweight if late is None else dweight.float().mul_(late)).to(weight.dtype)
    if needs[2]:
        grads[2] = sums.mul_(scale).to(bias.dtype)
    if needs[3]:
        grads[3] = target_gradient(grad, signs, target, rows, cell)
    return grads

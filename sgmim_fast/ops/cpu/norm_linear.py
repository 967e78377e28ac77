"""`norm_linear` on the CPU: library products, the norm in csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops import products
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.cpu.layer_norm import layer_norm, layer_norm_backward
from sgmim_fast.ops.cpu.linear_l1 import NATIVE
from sgmim_fast.ops.norm_linear import collect, result_dtype, storage_dtype


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    x, dtype = args[0 if part == "forward" else 1], args[-1]
    wanted = {x.dtype, dtype or x.dtype}
    return wanted <= set(NATIVE), f"dtype {dtype or x.dtype} of {x.dtype}; the C++ kernels take float32 and bfloat16"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    storage, statistics = storage_dtype(x, dtype), absent(x)
    if norm_weight is None:
        y = x.to(storage).contiguous()
    else:
        y, statistics = layer_norm(x.contiguous(), norm_weight, norm_bias, eps, storage)
    return products.linear(y, weight, bias, residual).to(result_dtype(x, residual, dtype)), statistics


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    grad = grad.to(storage_dtype(x, dtype)).contiguous()
    dbias = torch.empty(grad.shape[1])
    if needs[2]:
        torch.ops.sgmim_fast_cpu.column_sum(grad, dbias)
    dx = dnorm_weight = dnorm_bias = grad
    if needs[0] or norm_weight is not None:
        dx = products.linear_input_gradient(grad, weight)
    if norm_weight is None:
        y = x.to(grad.dtype)
    else:
        dx, y, (dnorm_weight, dnorm_bias) = layer_norm_backward(dx, x.contiguous(), statistics, norm_weight, norm_bias)
    dweight = products.linear_weight_gradient(grad, y) if needs[1] else grad
    return collect(x, weight, needs, [dx, dweight, dbias, dnorm_weight, dnorm_bias], norm_weight)

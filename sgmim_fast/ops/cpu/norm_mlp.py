"""`norm_mlp` on the CPU: library products, norm and GELU with its derivative in csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from sgmim_fast.ops import products
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.cpu.layer_norm import layer_norm, layer_norm_backward
from sgmim_fast.ops.cpu.norm_linear import can_run
from sgmim_fast.ops.norm_linear import result_dtype, storage_dtype
from sgmim_fast.ops.norm_mlp import collect

__all__ = ["backward", "can_run", "forward"]


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: bool,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    storage, statistics = storage_dtype(x, dtype), absent(x)
    if norm_weight is None:
        y = x.to(storage).contiguous()
    else:
        y, statistics = layer_norm(x.contiguous(), norm_weight, norm_bias, eps, storage)
    hidden = products.linear(y, fc1_weight, fc1_bias)
    activated = torch.empty_like(hidden)
    torch.ops.sgmim_fast_cpu.gelu(hidden, activated)
    added = x if residual else None
    out = products.linear(activated, fc2_weight, fc2_bias, added)
    return out.to(result_dtype(x, added, dtype)), hidden, statistics


def backward(
    grad: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    hidden: Tensor,
    statistics: Tensor,
    residual: bool,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    kernels = torch.ops.sgmim_fast_cpu
    added, grad = grad, grad.to(hidden.dtype).contiguous()
    # a float32 residual of bfloat16 products is added to their result instead, in float32
    inside = residual and norm_weight is not None and grad.dtype == torch.promote_types(grad.dtype, added.dtype)
    # dhidden turns in place from the gradient after GELU into the one before it
    dhidden = products.linear_input_gradient(grad, fc2_weight)
    activated, dfc1_bias, dfc2_bias = torch.empty_like(hidden), torch.empty(hidden.shape[1]), torch.empty(grad.shape[1])
    kernels.gelu_backward(hidden, dhidden, activated, dfc1_bias)
    kernels.column_sum(grad, dfc2_bias)
    dfc2 = products.linear_weight_gradient(grad, activated) if needs[3] else grad
    del activated
    dx = dnorm_weight = dnorm_bias = grad
    if needs[0] or norm_weight is not None:
        dx = products.linear_input_gradient(dhidden, fc1_weight)
    if norm_weight is None:
        y = x.to(hidden.dtype)
    else:
        dx, y, (dnorm_weight, dnorm_bias) = layer_norm_backward(
            dx, x.contiguous(), statistics, norm_weight, norm_bias, residual=grad if inside else None
        )
    if residual and not inside:
        dx = dx + added
    dfc1 = products.linear_weight_gradient(dhidden, y) if needs[1] else grad
    grads = [dx, dfc1, dfc1_bias, dfc2, dfc2_bias, dnorm_weight, dnorm_bias]
    return collect(x, fc1_weight, needs, grads, norm_weight)

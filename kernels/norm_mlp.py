"""`norm_mlp` in Triton: the norm's kernel, and two products with GELU and its derivative in their epilogues.

Cost: forward 3 launches, backward 8, and 1 each that casts the weights where their dtype is another. A residual is
added in the second product's epilogue, its gradient in the norm's backward, which also sums it for the second layer's
bias: 1 launch less. What is as wide as the hidden layer is written twice in the forward (before and after GELU), in the
backward read once, written twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgmim_fast.kernels import products
from sgmim_fast.kernels.launch import kept_copy, on_device
from sgmim_fast.kernels.norm_linear import as_read, can_run, normalized, normalized_backward
from sgmim_fast.kernels.sums import column_sums, finish
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.norm_linear import result_dtype, storage_dtype

__all__ = ["backward", "can_run", "forward"]


@on_device
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
    storage = storage_dtype(x, dtype)
    y, statistics = normalized(x, norm_weight, norm_bias, eps, storage)
    w1, b1, w2, b2 = as_read(storage, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    hidden, activated = products.linear_gelu(y, w1, b1)
    added = x.contiguous() if residual else None
    wanted = result_dtype(x, added, dtype)
    return products.linear(activated, w2, b2, residual=added, dtype=wanted).to(wanted), hidden, statistics


@on_device
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
    storage = hidden.dtype
    added, grad = grad.contiguous() if residual else None, grad.to(storage).contiguous()
    found = {
        i: torch.empty(size, dtype=fc1_weight.dtype, device=x.device)
        for i, size in ((2, hidden.shape[1]), (4, grad.shape[1]))
    }
    w1, w2 = (kept_copy(weight, storage) for weight in (fc1_weight, fc2_weight))
    dhidden, activated, fc1_sum = products.input_gradient_gelu(grad, w2, hidden, found[2])
    if needs[3]:
        (found[3],) = products.weight_gradients([grad], [activated], [fc1_weight.dtype])
    del activated  # as wide as anything here
    dy = None
    if needs[0] or norm_weight is not None:
        (dy,) = products.input_gradients([dhidden], [w1])
    found[0], y, sums = normalized_backward(
        dy,
        x,
        statistics,
        norm_weight,
        norm_bias,
        storage,
        again=needs[1],
        residual=added,
        residual_sum=found[4] if residual and needs[4] else None,
    )
    if norm_weight is not None:
        found |= {5: sums[0].out, 6: sums[1].out}
    if needs[4] and not residual:
        sums += column_sums([grad], [found[4]])
    if needs[1]:
        (found[1],) = products.weight_gradients([dhidden], [y], [fc1_weight.dtype])
    finish([fc1_sum, *sums])
    return [found[i] if need else absent(x) for i, need in enumerate(needs)]

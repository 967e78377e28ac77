"""`norm_linear` in Triton: the norm's kernel before a product.

Cost: forward reads and writes the rows once in the norm, then the product; 2 launches, 1 to cast the weight where its
dtype is another. Backward: two products, the norm's rows read and written once more with dx, the bias's gradient from
one more reading of dy; 5 launches and the cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.kernels import products
from sgmim_fast.kernels.launch import copies_of, fits, keep_copy, kept_copy, on_device, supported
from sgmim_fast.kernels.layer_norm import Norm, NormGradient, layer_norm, layer_norm_backward
from sgmim_fast.kernels.sums import Sum, column_sums, finish
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.norm_linear import result_dtype, storage_dtype


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    x, dtype = args[0 if part == "forward" else 1], args[-1]
    for wanted in (x.dtype, dtype or x.dtype):
        usable, reason = supported(wanted)
        if not usable:
            return usable, reason
    return fits(x.shape[1])


def normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the product reads, in `dtype`, and the statistics; without a norm x itself, and nothing."""
    if weight is None:
        return x.to(dtype).contiguous(), absent(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    (statistics,) = layer_norm([Norm(x.contiguous(), weight.contiguous(), bias.contiguous(), y)], eps)
    return y, statistics


def normalized_backward(
    dy: Tensor | None,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    again: bool,
    residual: Tensor | None = None,
    residual_sum: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Sum]]:
    """dx + residual in x's dtype, what the product read if `again`, and the sums to be finished: for the norm's two, if
    there is one, then of the residual's rows, if that goes into `residual_sum`.
    """
    if weight is None:
        dx = None if dy is None else (dy if residual is None else dy + residual).to(x.dtype)
        sums = [] if residual_sum is None else column_sums([residual], [residual_sum])
        return dx, x.to(dtype).contiguous() if again else None, sums
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vectors = weight.contiguous(), bias.contiguous()
    biases = () if residual_sum is None else (residual_sum,)
    norm = NormGradient(dy, x.contiguous(), statistics, *vectors, dx, residual=residual, again=again, biases=biases)
    (y,), (sums,) = layer_norm_backward([norm])
    return dx, y, sums


def as_read(dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    """Weights and biases as the products read them; the backward has the weights' copies by `kept_copy`."""
    present = [t for t in parameters if t is not None]
    copies = copies_of(present, dtype) or [t.contiguous() for t in present]
    for parameter, copy in zip(present, copies, strict=True):
        if parameter.ndim == 2:
            keep_copy(parameter, copy)
    found = iter(copies)
    return [None if t is None else next(found) for t in parameters]


@on_device
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
    storage = storage_dtype(x, dtype)
    y, statistics = normalized(x, norm_weight, norm_bias, eps, storage)
    wanted, residual = result_dtype(x, residual, dtype), None if residual is None else residual.contiguous()
    out = products.linear(y, *as_read(storage, weight, bias), residual=residual, dtype=wanted)
    return out.to(wanted), statistics


@on_device
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
    storage = storage_dtype(x, dtype)
    grad = grad.to(storage).contiguous()
    dy = None
    if needs[0] or norm_weight is not None:
        (dy,) = products.input_gradients([grad], [kept_copy(weight, storage)])
    dx, y, sums = normalized_backward(dy, x, statistics, norm_weight, norm_bias, storage, again=needs[1])
    found = {0: dx} | {3 + i: s.out for i, s in enumerate(sums)}
    if needs[1]:
        (found[1],) = products.weight_gradients([grad], [y], [weight.dtype])
    if needs[2]:
        found[2] = torch.empty(weight.shape[0], dtype=weight.dtype, device=x.device)
        sums += column_sums([grad], [found[2]])
    if sums:
        finish(sums)
    return [found[i] if need else absent(x) for i, need in enumerate(needs)]

"""Gemms on a CPU: our own where they are faster than the library's, csrc/cpu/linear.cpp and wgrad.cpp.

Their epilogues are bias, residual, GELU and its derivative. With AVX512-BF16 our gemms read float32 weights with
bfloat16 activations and write weight gradients in float32, so that nothing is cast before or after. With AMX the
library's gemms are several times faster; they get copies of the weights.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sgmim_fast.ops import gemm
from sgmim_fast.ops.primitives import cast, float32, wider
from sgmim_fast.ops.weights import weights_in as in_one_dtype


@functools.cache
def reads_float32_weights() -> bool:
    """Whether bfloat16 gemms read float32 weights."""
    return torch.ops.sgmim_fast_cpu.isa() == "avx512bf16" and not torch.cpu._is_amx_tile_supported()


def weights_in(dtype: torch.dtype, *weights: Tensor | None, last: bool = False) -> list[Tensor | None]:
    """Implements `Primitives.weights_in`."""
    as_they_are = dtype == torch.bfloat16 and reads_float32_weights()
    if as_they_are and all(weight is None or weight.dtype == torch.float32 for weight in weights):
        dtype = torch.float32
    return in_one_dtype(dtype, *weights, last=last)


@functools.cache
def _in_float32() -> bool:
    """Whether float32 gemms are our own: on AMD with AVX-512, instead of oneDNN's. Elsewhere MKL is as fast."""
    return torch.ops.sgmim_fast_cpu.isa().startswith("avx512") and gemm._mkl_is_slow()


# Rows from which float32 gemms are our own. With fewer, they are faster, too, but the library's sums are more precise.
MANY_ROWS = 192


def ours(x: Tensor) -> bool:
    """Whether fprop and dgrad of these rows use our own gemm."""
    rows, columns = x.shape
    if x.dtype == torch.float32:
        return rows >= MANY_ROWS and columns >= 32 and _in_float32()
    return x.dtype == torch.bfloat16 and rows > 0 and columns > 0 and columns % 2 == 0 and reads_float32_weights()


def _read(weight: Tensor, x: Tensor) -> Tensor:
    """Returns the weight as our gemms with operand x read it."""
    return (cast(weight, torch.float32) if x.dtype == torch.float32 else weight).contiguous()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`gemm.linear` for a weight of any dtype."""
    if not ours(x):
        return gemm.linear(x, weight.to(x.dtype), bias, scale=scale, residual=residual, dtype=dtype)
    out = dtype or x.dtype if residual is None else wider(x.dtype, residual.dtype)
    inside = out in (torch.float32, x.dtype)  # the dtypes in which the kernel adds the residual and writes
    y = torch.empty(x.shape[0], weight.shape[0], dtype=out if inside else torch.float32)
    added = cast(residual, out).contiguous() if inside and residual is not None else None
    bias, scale = (None if t is None else cast(t, torch.float32).contiguous() for t in (bias, scale))
    torch.ops.sgmim_fast_cpu.linear(x.contiguous(), _read(weight, x), False, bias, scale, added, y)
    y = y if inside or residual is None else y + residual
    return y if dtype is None else cast(y, dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Implements `Primitives.linear_gelu`."""
    if not ours(x):
        pre_activation = linear(x, weight, bias)
        activated = torch.empty_like(pre_activation)
        torch.ops.sgmim_fast_cpu.gelu(pre_activation, activated)
        return pre_activation, activated
    pre_activation, activated = (torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype) for _ in range(2))
    arguments = x.contiguous(), _read(weight, x), cast(bias, torch.float32).contiguous()
    torch.ops.sgmim_fast_cpu.linear_gelu(*arguments, pre_activation, activated)
    return pre_activation, activated


def dgrad(dy: Tensor, weight: Tensor, residual: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """`gemm.dgrad` for a weight of any dtype; returns `dtype`, by default dy's, or the wider one of dy and residual."""
    dtype = dtype or (dy.dtype if residual is None else wider(dy.dtype, residual.dtype))
    if not ours(dy):
        return gemm.dgrad(dy, weight.to(dy.dtype), residual).to(dtype)
    written = dtype if dtype in (torch.float32, dy.dtype) else torch.float32
    dx = torch.empty(dy.shape[0], weight.shape[1], dtype=written)
    residual = None if residual is None else cast(residual, written).contiguous()
    torch.ops.sgmim_fast_cpu.linear(dy.contiguous(), _read(weight, dy), True, None, None, residual, dx)
    return cast(dx, dtype)


def dgrad_gelu(dy: Tensor, weight: Tensor, pre_activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `Primitives.dgrad_gelu`."""
    dtype = pre_activation.dtype
    activated, total = torch.empty(pre_activation.shape, dtype=dtype), float32(pre_activation.shape[1])
    if not ours(dy):
        dpre_activation = dgrad(dy, weight)  # gradient after GELU, overwritten with the gradient before it
        torch.ops.sgmim_fast_cpu.gelu_backward(pre_activation, dpre_activation, activated, total)
        return dpre_activation, activated, total
    dpre_activation = torch.empty(pre_activation.shape, dtype=dtype)
    arguments = dy.contiguous(), _read(weight, dy), pre_activation
    torch.ops.sgmim_fast_cpu.dgrad_gelu(*arguments, dpre_activation, activated, total)
    return dpre_activation, activated, total


def wgrad(dy: Tensor, x: Tensor) -> Tensor:
    """`gemm.wgrad`; our own returns float32."""
    if dy.dtype == torch.float32:
        own = dy.shape[0] >= MANY_ROWS and _in_float32()
    else:
        own = dy.dtype == torch.bfloat16 and reads_float32_weights()
    if not own:
        return gemm.wgrad(dy, x)
    dw = float32(dy.shape[1], x.shape[1])
    torch.ops.sgmim_fast_cpu.wgrad(dy.contiguous(), x.contiguous(), dw)
    return dw

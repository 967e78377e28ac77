"""Conversions, products and GELU as every kernel writes them.

`cast` and `dot` are Triton's own on a GPU. Its interpreter truncates float32 to bfloat16 where a GPU rounds to the
nearest, takes integers for the bits of bfloat16 numbers, and multiplies those bits; there they are written out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgmim_fast.kernels.launch import INTERPRETED

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to the nearest, ties to even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += (bits >> 16 & 1) + 0x7FFF
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a . b, summed in float32; PRECISION as `launch.tf32` gives it."""
    if _INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def inside_of(index, count):
    """The index, or the nearest of those from 0 to below `count`. Nobody looks at indices on a GPU before they are
    used, so a wrong one gives a wrong result, but no access outside of a tensor."""
    return tl.minimum(tl.maximum(index, 0), count - 1)


@triton.jit
def add(total, lost, x):
    """total + x, and what its rounding loses added to `lost` (Neumaier's sum: the result is total + lost)."""
    result = total + x
    lost += tl.where(tl.abs(total) >= tl.abs(x), (total - result) + x, (x - result) + total)
    return result, lost


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)

"""Casts, gemms and GELU as device functions that all kernels share.

On a GPU `cast` and `dot` are Triton's own. Triton's interpreter truncates float32 to bfloat16 where a GPU rounds to the
nearest, reads integers as the bits of bfloat16 numbers, and multiplies those bits; for it, both are written out.
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
    """Returns x in DTYPE, rounded to the nearest, ties to even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += (bits >> 16 & 1) + 0x7FFF
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Returns total + a . b, accumulated in float32. PRECISION: from `launch.tf32`."""
    if _INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def inside_of(index, count):
    """Clamps an index to [0, count). On a GPU nothing checks indices before they are used: a wrong one leads to a wrong
    result, but not to an access outside of a tensor."""
    return tl.minimum(tl.maximum(index, 0), count - 1)


@triton.jit
def _tail(x):
    """1 - Phi(|x|), Phi the normal distribution function, to 8e-8, and exp(-x^2 / 2). Abramowitz and Stegun 7.1.26."""
    u = tl.abs(x) * 0.7071067811865476
    t = 1 / (1 + 0.3275911 * u)
    e = tl.exp(-u * u)
    poly = t * (0.127414796 + t * (-0.142248368 + t * (0.710706870 + t * (-0.726576014 + t * 0.530702714))))
    return poly * e, e


@triton.jit
def gelu(x):
    tail, _ = _tail(x)
    return x * tl.where(x >= 0, 1 - tail, tail)


@triton.jit
def gelu_both(x):
    """Returns gelu(x) and its derivative."""
    tail, e = _tail(x)
    phi = tl.where(x >= 0, 1 - tail, tail)
    return x * phi, phi + x * 0.3989422804014327 * e


@triton.jit
def gelu_derivative(x):
    _, slope = gelu_both(x)
    return slope

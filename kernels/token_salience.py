"""`token_salience` in Triton: two passes over tiles of the inner products, which are never stored.

The first pass computes each row's maximum and sum of exponentials as FlashAttention does. The second sums, over the
other
tokens i, what i pays to j minus what j pays to i: s_j - 1, in which the attention of a token to itself cancels before
anything is rounded. Both passes compute the gemm. No program depends on another's sum, so two runs have the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import dot
from sgmim_fast.kernels.launch import cdiv, launch, on_device, tf32
from sgmim_fast.ops.token_salience import stretched

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _products(
    x, rows, columns, tokens, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Returns x_i . x_j of a tile in float32. x: the image's (tokens, depth)."""
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + rows[:, None] * depth + k, mask=(rows < tokens)[:, None] & (k < depth), other=0)
        b = tl.load(x + columns[None, :] * depth + k[:, None], mask=(columns < tokens) & (k < depth)[:, None], other=0)
        out = dot(a, b, out, TF32)
    return out


@triton.jit
def _rows_kernel(
    x, row_max, inverse, tokens, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Stores, of x_i . x_j over j, the maximum (B, N) and the reciprocal of the sum of exp(x_i . x_j - maximum). The
    logarithm of that sum would be rounded, with the same error for the whole row."""
    image = tl.program_id(1).to(tl.int64)
    x += image * tokens * depth
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits = _products(x, rows, columns, tokens, depth, BLOCK_M, BLOCK_N, BLOCK_K, TF32)
        logits = tl.where(columns[None, :] < tokens, logits, float("-inf"))
        new_max = tl.maximum(maximum, tl.max(logits, 1))
        row_sum = row_sum * tl.exp(maximum - new_max) + tl.sum(tl.exp(logits - new_max[:, None]), 1)
        maximum = new_max
    tl.store(row_max + image * tokens + rows, maximum, mask=rows < tokens)
    tl.store(inverse + image * tokens + rows, 1 / row_sum, mask=rows < tokens)


@triton.jit
def _columns_kernel(
    x, row_max, inverse, sums, tokens, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Stores sums (B, N) over i of A_ij - A_ji, in float64. The same x_i . x_j yields both terms."""
    image = tl.program_id(1).to(tl.int64)
    x += image * tokens * depth
    row_max += image * tokens
    inverse += image * tokens
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    max_j = tl.load(row_max + columns, mask=columns < tokens, other=0)
    inverse_j = tl.load(inverse + columns, mask=columns < tokens, other=0)
    total = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        logits = _products(x, rows, columns, tokens, depth, BLOCK_M, BLOCK_N, BLOCK_K, TF32)
        max_i = tl.load(row_max + rows, mask=rows < tokens, other=0)
        inverse_i = tl.load(inverse + rows, mask=rows < tokens, other=0)
        received = tl.exp(logits - max_i[:, None]) * inverse_i[:, None]
        paid = tl.exp(logits - max_j[None, :]) * inverse_j[None, :]
        total += tl.sum(tl.where((rows < tokens)[:, None], received - paid, 0.0).to(tl.float64), 0)
    tl.store(sums + image * tokens + columns, total, mask=columns < tokens)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    dtype = args[0].dtype
    return dtype in _DTYPES, f"dtype {dtype}; the Triton kernel takes {', '.join(str(d)[6:] for d in _DTYPES)}"


@on_device
def forward(x: Tensor) -> Tensor:
    """Cost: N^2 D multiply-adds twice; reads x N / 64 times (from L2), writes 4 N elements; 2 launches, and
    PyTorch's of the rescaling."""
    x = x.contiguous()
    images, tokens, depth = x.shape
    row_max, inverse = (torch.empty(images, tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    sums = torch.empty(images, tokens, dtype=torch.float64, device=x.device)
    grid = cdiv(tokens, 64), images
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64 if x.element_size() == 2 else 32, "TF32": tf32()}
    launch(_rows_kernel, grid, x, row_max, inverse, tokens, depth, **tile, num_warps=8)
    launch(_columns_kernel, grid, x, row_max, inverse, sums, tokens, depth, **tile, num_warps=8)
    return stretched(sums).float()

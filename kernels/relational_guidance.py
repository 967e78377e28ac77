"""The attention of `relational_guidance` in Triton, primitives: one kernel forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import cast, dot
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2, tf32
from sgmim_fast.kernels.sums import Sum, finish
from sgmim_fast.ops.primitives import Packed


@triton.jit
def _keys(shown_offsets, image, last, cells, KEEP: tl.constexpr):
    """Returns the first row and number of an image's shown keys, and of the hidden cells that share the last key."""
    first, count = _range(shown_offsets, image, last, cells)
    hidden = cells - count if KEEP else 0 * count
    return first, count, hidden


@triton.jit
def _range(offsets, image, rows, cells):
    """Returns an image's first row and number of rows, clamped to the `rows` that exist for any offsets."""
    first = tl.minimum(tl.maximum(tl.load(offsets + image), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(offsets + image + 1), first), rows)
    return first, tl.minimum(end - first, cells).to(tl.int32)


@triton.jit
def _rows(x, row, here, width, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads one head's part of rows, (rows, BLOCK_D), zero elsewhere."""
    d = tl.arange(0, BLOCK_D)
    at = row[:, None] * width + head * D + d[None, :]
    return tl.load(x + at, mask=here[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _logits(q, k, j, count, hidden, scale, PRECISION: tl.constexpr):
    """Returns logits (queries, keys); the key after the last shown one stands for `hidden` cells."""
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32), PRECISION) * scale
    s += tl.where(j == count, tl.log(tl.maximum(hidden, 1).to(tl.float32)), 0.0)[None, :]
    there = (j < count) | ((j == count) & (hidden > 0))
    return tl.where(there[None, :], s, float("-inf"))


@triton.jit
def _lse(lse, row, there, visible, heads, head):
    """Loads both parts of the rows' logsumexp."""
    at = row * heads + head
    row_max = tl.load(lse + at, mask=there, other=0.0)
    return row_max, tl.load(lse + visible * heads + at, mask=there, other=0.0)


@triton.jit
def _relational_guidance_forward_kernel(
    q, k, v, out, lse, visible_offsets, shown_offsets, visible, last, cells, heads, width, scale,
    KEEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1), tl.program_id(2)
    begin, queries = _range(visible_offsets, image, visible, cells)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < queries:
        first, count, hidden = _keys(shown_offsets, image, last, cells, KEEP)
        row = begin + i
        query = _rows(q, row, i < queries, width, head, D, BLOCK_D)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, count + 1, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            key_row = tl.where(j < count, first + j, last)
            key = _rows(k, key_row, j <= count, width, head, D, BLOCK_D)
            value = _rows(v, key_row, j <= count, width, head, D, BLOCK_D)
            s = _logits(query, key, j, count, hidden, scale, PRECISION)
            new_max = tl.maximum(row_max, tl.max(s, 1))
            finite = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf: no key so far
            p = tl.exp(s - finite[:, None])
            rescale = tl.exp(row_max - finite)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            total = dot(cast(p, value.dtype), value, total * rescale[:, None], PRECISION)
            row_max = new_max
        any_key = row_sum > 0
        total /= tl.where(any_key, row_sum, 1.0)[:, None]
        d = tl.arange(0, BLOCK_D)
        at = row[:, None] * width + head * D + d[None, :]
        tl.store(out + at, cast(total, out.dtype.element_ty), mask=(i < queries)[:, None] & (d < D)[None, :])
        at = row * heads + head
        tl.store(lse + at, tl.where(any_key, row_max, 0.0), mask=i < queries)
        tl.store(lse + visible * heads + at, tl.log(tl.where(any_key, row_sum, 1.0)), mask=i < queries)


@triton.jit
def _relational_guidance_backward_kernel(
    dout, q, k, v, out, lse, visible_offsets, shown_offsets, dq, dk, dv, hidden_sums,
    visible, last, cells, heads, width, scale, key_blocks,
    KEEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs below `key_blocks` sum over queries for dk and dv, the others over keys for dq; none share a sum."""
    block, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, queries = _range(visible_offsets, image, visible, cells)
    first, count, hidden = _keys(shown_offsets, image, last, cells, KEEP)
    single = count + (hidden > 0).to(tl.int32) == 1  # a single key has weight 1 and no gradient: avoid rounding errors
    d = tl.arange(0, BLOCK_D)
    if block < key_blocks:
        j = block * BLOCK_N + tl.arange(0, BLOCK_N)
        if block * BLOCK_N <= count:
            key_row = tl.where(j < count, first + j, last)
            key = _rows(k, key_row, j <= count, width, head, D, BLOCK_D)
            value = _rows(v, key_row, j <= count, width, head, D, BLOCK_D)
            dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for start in range(0, queries, BLOCK_M):
                i = start + tl.arange(0, BLOCK_M)
                row = begin + i
                query = _rows(q, row, i < queries, width, head, D, BLOCK_D)
                grad = _rows(dout, row, i < queries, width, head, D, BLOCK_D)
                attended = _rows(out, row, i < queries, width, head, D, BLOCK_D)
                delta = tl.sum(grad.to(tl.float32) * attended.to(tl.float32), 1)
                row_max, log_sum = _lse(lse, row, i < queries, visible, heads, head)
                s = _logits(query, key, j, count, hidden, scale, PRECISION)
                p = tl.exp(s - row_max[:, None] - log_sum[:, None])
                dp = dot(grad, tl.trans(value), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
                ds = tl.where(single, 0.0, p * (dp - delta[:, None]) * scale)
                dvalue = dot(tl.trans(cast(p, grad.dtype)), grad, dvalue, PRECISION)
                dkey = dot(tl.trans(cast(ds, query.dtype)), query, dkey, PRECISION)
            at = key_row[:, None] * width + head * D + d[None, :]
            inside = (j < count)[:, None] & (d < D)[None, :]
            tl.store(dk + at, cast(dkey, dk.dtype.element_ty), mask=inside)
            tl.store(dv + at, cast(dvalue, dv.dtype.element_ty), mask=inside)
            at = image.to(tl.int64) * width + head * D + d[None, :] + 0 * j[:, None]
            inside = (j == count)[:, None] & (d < D)[None, :]
            tl.store(hidden_sums + at, dkey, mask=inside)
            tl.store(hidden_sums + tl.num_programs(2).to(tl.int64) * width + at, dvalue, mask=inside)
    else:
        i = (block - key_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        if (block - key_blocks) * BLOCK_M < queries:
            row = begin + i
            query = _rows(q, row, i < queries, width, head, D, BLOCK_D)
            grad = _rows(dout, row, i < queries, width, head, D, BLOCK_D)
            attended = _rows(out, row, i < queries, width, head, D, BLOCK_D)
            delta = tl.sum(grad.to(tl.float32) * attended.to(tl.float32), 1)
            row_max, log_sum = _lse(lse, row, i < queries, visible, heads, head)
            dquery = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for start in range(0, count + 1, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                key_row = tl.where(j < count, first + j, last)
                key = _rows(k, key_row, j <= count, width, head, D, BLOCK_D)
                value = _rows(v, key_row, j <= count, width, head, D, BLOCK_D)
                s = _logits(query, key, j, count, hidden, scale, PRECISION)
                p = tl.exp(s - row_max[:, None] - log_sum[:, None])
                dp = dot(grad, tl.trans(value), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
                ds = tl.where(single, 0.0, p * (dp - delta[:, None]) * scale)
                dquery = dot(cast(ds, key.dtype), key, dquery, PRECISION)
            at = row[:, None] * width + head * D + d[None, :]
            tl.store(dq + at, cast(dquery, dq.dtype.element_ty), mask=(i < queries)[:, None] & (d < D)[None, :])


def _options(q: Tensor, packed: Packed, backward: bool) -> dict[str, Any]:
    """Returns block sizes, as small as the grid of cells allows: Swin's 36 cells need at most 32 queries at a time.

    The backward holds five tiles of a head's width. Float32 gemms run on the scalar units and need whole rows of
    operands too, so that the backward spills even with 16 queries. In half precision, 4 warps, tiles as large as
    possible and no pipelining of loads were the fastest of 24 settings measured on an H200, by 1.7.
    """
    half, d, cells = q.dtype != torch.float32, q.shape[1] // packed.heads, packed.cells
    most = 64 if half else 16 if backward else 32
    block = min(64 if cells > 48 else 32 if cells > 16 else 16, most)
    return {
        "KEEP": packed.keep,
        "D": d,
        "BLOCK_D": max(next_power_of_2(d), 16),
        "BLOCK_M": block if half and backward else min(block, 32),
        "BLOCK_N": block,
        "PRECISION": tf32(),
        "num_warps": 4 if half else 8,
        "num_stages": 1 if half and backward else 2,
    }


def guidance_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Cost: reads q, and k and v once per block of 32 queries; 1 launch."""
    out = torch.empty_like(q)
    lse = torch.empty(2, q.shape[0], packed.heads, dtype=torch.float32, device=q.device)
    options = _options(q, packed, False)
    launch(
        _relational_guidance_forward_kernel,
        (cdiv(packed.cells, options["BLOCK_M"]), packed.heads, packed.visible_offsets.shape[0] - 1),
        q,
        k,
        v,
        out,
        lse,
        *_sizes(q, k, packed, packed.visible_offsets, packed.shown_offsets),
        **options,
    )
    return out, lse


def guidance_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums the last key's gradients over the images in a fixed order.

    Cost: reads q, dout and out once per block of keys, k and v once per block of queries; 2 launches.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    images = packed.visible_offsets.shape[0] - 1
    hidden_sums = torch.empty(2, images, q.shape[1], dtype=torch.float32, device=q.device)
    options = _options(q, packed, True)
    key_blocks = cdiv(packed.cells + 1, options["BLOCK_N"])
    tensors = packed.visible_offsets, packed.shown_offsets, dq, dk, dv, hidden_sums
    launch(
        _relational_guidance_backward_kernel,
        (key_blocks + cdiv(packed.cells, options["BLOCK_M"]), packed.heads, images),
        dout,
        q,
        k,
        v,
        out,
        lse,
        *_sizes(q, k, packed, *tensors),
        key_blocks,
        **options,
    )
    finish([Sum(hidden_sums[0], dk[-1]), Sum(hidden_sums[1], dv[-1])])
    return dq, dk, dv


def _sizes(q: Tensor, k: Tensor, packed: Packed, *tensors: Tensor) -> tuple[Any, ...]:
    """Returns the tensors, followed by the sizes that the kernels take."""
    width = q.shape[1]
    numbers = q.shape[0], k.shape[0] - 1, packed.cells, packed.heads, width, (width // packed.heads) ** -0.5
    return *tensors, *numbers

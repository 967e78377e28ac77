"""`window_attention` in Triton, for windows of up to 64 tokens: one kernel forward, one backward, and sums over
windows. Larger windows are computed by `large_windows`.

A tile has all tokens of a window, so a row's softmax is complete within it. A program keeps one head's bias, and in the
backward the sum of the bias's gradient, in registers, for a group of windows in turn. The backward recomputes the
softmax from the logits: a saved logsumexp would be less exact where logits are large.

Cost, with n tokens per window and rows of C channels. Forward: reads 3 rows and writes 1; 4 n C operations per token; 1
launch. Backward: reads 4 rows and writes 3; 10 n C operations; 1 launch, 1 for all sums over groups of windows, and 2
that gather a table's gradient from the dense one. Partial sums of the bias: 4 n^2 bytes per program.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import large_windows
from sgmim_fast.kernels.arithmetic import cast, dot
from sgmim_fast.kernels.attention_tile import (
    WindowCall,
    inverse_norms,
    load_biases,
    load_keys,
    load_rows,
    load_scale,
    logits,
    places,
    store_keys,
    store_padding,
    store_rows,
    store_scale,
    unit,
    unit_backward,
)
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2
from sgmim_fast.kernels.sums import column_sums, finished
from sgmim_fast.ops.primitives import Windows
from sgmim_fast.ops.window_attention import ONE_TILE

TABLE_BLOCK = 32  # positions of the logits that one program adds to the entries of a bias table


@triton.jit
def _window_attention_forward_kernel(
    qkv, bias, index, logit_scale, pad, out, geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, group, channels = tl.program_id(0), tl.program_id(1), heads * D
    t = tl.arange(0, BLOCK)
    biases = load_biases(bias, index, head, heads, entries, t, t, N)
    scale = load_scale(logit_scale, head, D)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        image, row, exists, side = places(window, t, geometry, WINDOW_H, WINDOW_W)
        q = load_rows(qkv, image, row, exists, 3 * channels, head * D, D, BLOCK_D)
        k, v = load_keys(qkv, pad, image, row, exists, channels, head, t, N, D, BLOCK_D)
        q_inverse, k_inverse = inverse_norms(q, COSINE), inverse_norms(k, COSINE)
        s = logits(q, k, q_inverse, k_inverse, side, side, biases, scale, t, N, SHIFTED, COSINE, PRECISION)
        p = tl.exp(s - tl.max(s, 1)[:, None])
        total = dot(cast(p, v.dtype), v, tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION)
        store_rows(out, total / tl.sum(p, 1)[:, None], image, row, exists, channels, head * D, D, BLOCK_D)


@triton.jit
def _window_attention_backward_kernel(
    dout, qkv, bias, index, logit_scale, pad, dqkv, dbias, dscale, dpad,
    geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dqkv, and the group's sums for bias, scale and padding."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, group, channels = tl.program_id(0), tl.program_id(1), heads * D
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    biases = load_biases(bias, index, head, heads, entries, i, j, N)
    scale = load_scale(logit_scale, head, D)
    if dbias is not None:
        bias_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    k_sum = tl.zeros([BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_D], tl.float32)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        # Queries and keys are the same tokens. One set of their rows for both would be kept in more registers.
        image, q_row, q_exists, q_side = places(window, i, geometry, WINDOW_H, WINDOW_W)
        _, k_row, k_exists, k_side = places(window, j, geometry, WINDOW_H, WINDOW_W)
        q = load_rows(qkv, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        k, v = load_keys(qkv, pad, image, k_row, k_exists, channels, head, j, N, D, BLOCK_D)
        q_inverse, k_inverse = inverse_norms(q, COSINE), inverse_norms(k, COSINE)
        s = logits(q, k, q_inverse, k_inverse, q_side, k_side, biases, scale, j, N, SHIFTED, COSINE, PRECISION)
        grad = load_rows(dout, image, q_row, q_exists, channels, head * D, D, BLOCK_D)
        p = tl.exp(s - tl.max(s, 1)[:, None])
        p *= (1 / tl.sum(p, 1))[:, None]
        dp = dot(grad, tl.trans(v), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if dbias is not None:
            bias_sum += ds
        ds = cast(ds, q.dtype)
        dq = dot(ds, unit(k, k_inverse, COSINE), tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION) * scale
        if COSINE:
            dq, along = unit_backward(dq, q, q_inverse)
            scale_sum += along
        store_rows(dqkv, dq, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        dv = dot(tl.trans(cast(p, grad.dtype)), grad, tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION)
        dk = dot(tl.trans(ds), unit(q, q_inverse, COSINE), tl.zeros([BLOCK, BLOCK_D], tl.float32), PRECISION)
        dk, dv = store_keys(
            dk, dv, k, k_inverse, scale, dqkv, image, k_row, k_exists, j, channels, head, N, COSINE, D, BLOCK_D
        )
        if dpad is not None:
            k_sum += dk
            v_sum += dv
    if dbias is not None:
        at = dbias + (group * heads + head).to(tl.int64) * N * N + i[:, None] * N + j[None, :]
        tl.store(at, bias_sum, mask=(i < N)[:, None] & (j < N)[None, :])
    store_scale(dscale, logit_scale, scale_sum, group, head, heads)
    store_padding(dpad, k_sum, v_sum, group, channels, head, D, BLOCK_D)


@triton.jit
def _window_attention_entries_kernel(
    dense, index, partials, positions, entries, heads,
    ENTRIES: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums `dense` (heads, positions) over a block of positions by entry, in a gemm with a matrix of 0 and 1. Positions
    next to each other have entries next to each other, so most blocks have none of the program's, and skip the gemm."""
    e = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    h = tl.arange(0, HEADS)
    total = tl.zeros([ENTRIES, HEADS], tl.float32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(index + at, mask=at < positions, other=-1)
    chosen = e[:, None] == entry[None, :]
    if tl.max(tl.max(chosen.to(tl.int32), 1), 0) > 0:
        inside = (at < positions)[:, None] & (h < heads)[None, :]
        values = tl.load(dense + h[None, :] * positions + at[:, None], mask=inside, other=0.0)
        ones = cast(chosen.to(tl.float32), tl.bfloat16)
        for _ in tl.static_range(3):  # the values as exact sums of three bfloat16 numbers, for the tensor cores
            part = cast(values, tl.bfloat16)
            total = dot(ones, part, total, "ieee")
            values -= part.to(tl.float32)
    at = (tl.program_id(1) * entries + e)[:, None] * heads + h[None, :]
    tl.store(partials + at, total, mask=(e < entries)[:, None] & (h < heads)[None, :])


def table_sum(dense: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """Sums the dense gradient (heads * n * n,) to a table's (entries, heads), in partial sums. Cost: 1 launch."""
    positions, (entries, heads) = index.numel(), table.shape
    chunks = cdiv(positions, TABLE_BLOCK)
    partials = torch.empty(chunks, entries * heads, dtype=torch.float32, device=dense.device)
    launch(
        _window_attention_entries_kernel,
        (cdiv(entries, 32), chunks),
        dense,
        index,
        partials,
        positions,
        entries,
        heads,
        ENTRIES=32,
        HEADS=max(16, next_power_of_2(heads)),
        BLOCK=TABLE_BLOCK,
    )
    return partials


def _options(call: WindowCall, dtype: torch.dtype) -> dict[str, Any]:
    block = max(16, next_power_of_2(call.tokens))
    return {"BLOCK": block, "num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 1}


def window_attention(qkv: Tensor, w: Windows) -> Tensor:
    call = WindowCall(qkv, w)
    if call.tokens > ONE_TILE:
        return large_windows.window_attention(qkv, call)
    out = torch.empty(*qkv.shape[:3], qkv.shape[3] // 3, dtype=qkv.dtype, device=qkv.device)
    call.launch(_window_attention_forward_kernel, *call.inputs, out, **_options(call, qkv.dtype))
    return out


def window_attention_backward(
    grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    call, grad = WindowCall(qkv, w), grad.to(qkv.dtype).contiguous()
    if call.tokens > ONE_TILE:
        dqkv, sums, dpad = large_windows.window_attention_backward(grad, qkv, call, wanted)
    else:
        dqkv, sums, dpad = _backward(grad, qkv, call, wanted)
    return dqkv, sums | other_sums(dqkv, w, sums, dpad, wanted)


def _backward(
    grad: Tensor, qkv: Tensor, call: WindowCall, wanted: Container[str]
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    groups, _ = call.programs(1)
    sums = call.sums(wanted, groups, groups)
    dpad = call.padding_sums(wanted, groups)
    options = _options(call, qkv.dtype)
    if options["BLOCK"] == 64 and qkv.dtype.itemsize == 2:
        # 3 blocks of 4 warps per multiprocessor instead of 2: up to 12 % faster on an H200, although it spills
        options["maxnreg"] = 168
    arguments = dqkv, sums.get("bias"), sums.get("logit_scale"), dpad
    call.launch(_window_attention_backward_kernel, grad, *call.inputs, *arguments, **options)
    return dqkv, sums, dpad


def other_sums(
    dqkv: Tensor, w: Windows, sums: dict[str, Tensor], dpad: Tensor | None, wanted: Container[str]
) -> dict[str, Tensor]:
    """Returns partial sums that follow from those of the kernels: for a bias table, for the padding, and for qkv's
    bias.

    dpad: partial sums over the tokens outside the grid; None if there are none.
    """
    found = {}
    if "bias" in wanted and w.index is not None:
        (dense,) = finished([sums["bias"]], [torch.float32])
        found["bias"] = table_sum(dense, w.index.contiguous(), w.bias)
    if "pad" in wanted:
        none = dpad is None
        found["pad"] = torch.zeros(1, dqkv.shape[3], dtype=torch.float32, device=dqkv.device) if none else dpad
    if "qkv_bias" in wanted:
        (inside,) = column_sums([dqkv.flatten(0, 2)])
        found["qkv_bias"] = inside if dpad is None else torch.cat([inside, dpad])
    return found

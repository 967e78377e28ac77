"""`window_attention` in Triton, for windows of more than 64 tokens (SwinV2, ViT): tiles of queries and keys.

A program computes a block of a window's queries or keys, for one head and a group of windows in turn, over all blocks
of the other. Row maxima and sums of the softmax are updated from block to block. The backward has three kernels, so
that no sum needs atomics:

    queries    dq; and of each softmax row_max, 1 / row_sum and delta = sum(p dp), in a first pass over the keys
    keys       dk and dv, and their sums over the padding
    bias       a tile of the gradient of the bias, summed over the group's windows

They recompute logits and dp, so where one key has all the weight, its probability is only as exact as the logits of two
kernels agree.

Cost, with n tokens per window and rows of C channels: forward 4 n C operations per token and 1 launch; backward 18 n C
operations and 2 launches, with a bias 22 n C and 3, and those of `window_attention` for sums. A bias table takes 3 more
in each direction. Keys, values and bias are read once per block of queries, mostly from L2. Partial sums of the bias: 4
n^2 bytes per head and group.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from sgmim_fast.kernels.launch import cdiv


@triton.jit
def _block_of_keys(
    start, q, q_inverse, q_side, i, qkv, bias, index, pad, window, geometry, head, heads, entries, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, COSINE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loads keys and values of KEYS tokens from `start`. Returns them, 1 / |k| (see `inverse_norms`), and the logits of
    the queries q, which are tokens i."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    j = start + tl.arange(0, KEYS)
    image, row, exists, side = places(window, j, geometry, WINDOW_H, WINDOW_W)
    k, v = load_keys(qkv, pad, image, row, exists, heads * D, head, j, N, D, BLOCK_D)
    biases = load_biases(bias, index, head, heads, entries, i, j, N)
    inverse = inverse_norms(k, COSINE)
    s = logits(q, k, q_inverse, inverse, q_side, side, biases, scale, j, N, SHIFTED, COSINE, PRECISION)
    return k, v, inverse, s


@triton.jit
def _large_windows_forward_kernel(
    qkv, bias, index, logit_scale, pad, out, geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, group, channels = tl.program_id(0) % heads, tl.program_id(1), heads * D
    i = tl.program_id(0) // heads * QUERIES + tl.arange(0, QUERIES)
    scale = load_scale(logit_scale, head, D)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        image, q_row, q_exists, q_side = places(window, i, geometry, WINDOW_H, WINDOW_W)
        q = load_rows(qkv, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        q_inverse = inverse_norms(q, COSINE)
        row_max = tl.full([QUERIES], float("-inf"), tl.float32)
        row_sum = tl.zeros([QUERIES], tl.float32)
        total = tl.zeros([QUERIES, BLOCK_D], tl.float32)
        for start in range(0, N, KEYS):
            _, v, _, s = _block_of_keys(
                start, q, q_inverse, q_side, i, qkv, bias, index, pad, window, geometry, head, heads, entries, scale,
                WINDOW_H, WINDOW_W, SHIFTED, COSINE, D, BLOCK_D, KEYS, PRECISION,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp(s - new_max[:, None])
            rescale = tl.exp(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            total = dot(cast(p, v.dtype), v, total * rescale[:, None], PRECISION)
            row_max = new_max
        store_rows(out, total / row_sum[:, None], image, q_row, q_exists, channels, head * D, D, BLOCK_D)


@triton.jit
def _large_windows_queries_kernel(
    dout, qkv, bias, index, logit_scale, pad, dqkv, dscale, softmaxes,
    geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dq of a block of queries, the group's sum for the scale, and `softmaxes` (3, windows, heads, N)."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, channels = tl.program_id(0) % heads, heads * D
    block, group = tl.program_id(0) // heads, tl.program_id(1)
    i = block * QUERIES + tl.arange(0, QUERIES)
    scale = load_scale(logit_scale, head, D)
    scale_sum = tl.zeros([QUERIES], tl.float32)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        image, q_row, q_exists, q_side = places(window, i, geometry, WINDOW_H, WINDOW_W)
        q = load_rows(qkv, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        grad = load_rows(dout, image, q_row, q_exists, channels, head * D, D, BLOCK_D)
        q_inverse = inverse_norms(q, COSINE)
        row_max = tl.full([QUERIES], float("-inf"), tl.float32)
        row_sum = tl.zeros([QUERIES], tl.float32)
        delta = tl.zeros([QUERIES], tl.float32)
        for start in range(0, N, KEYS):
            _, v, _, s = _block_of_keys(
                start, q, q_inverse, q_side, i, qkv, bias, index, pad, window, geometry, head, heads, entries, scale,
                WINDOW_H, WINDOW_W, SHIFTED, COSINE, D, BLOCK_D, KEYS, PRECISION,
            )  # fmt: skip
            dp = dot(grad, tl.trans(v), tl.zeros([QUERIES, KEYS], tl.float32), PRECISION)
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp(s - new_max[:, None])
            rescale = tl.exp(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            delta = delta * rescale + tl.sum(p * dp, 1)
            row_max = new_max
        inverse_sum = 1 / row_sum
        delta *= inverse_sum
        dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
        for start in range(0, N, KEYS):
            k, v, k_inverse, s = _block_of_keys(
                start, q, q_inverse, q_side, i, qkv, bias, index, pad, window, geometry, head, heads, entries, scale,
                WINDOW_H, WINDOW_W, SHIFTED, COSINE, D, BLOCK_D, KEYS, PRECISION,
            )  # fmt: skip
            dp = dot(grad, tl.trans(v), tl.zeros([QUERIES, KEYS], tl.float32), PRECISION)
            ds = tl.exp(s - row_max[:, None]) * inverse_sum[:, None] * (dp - delta[:, None])
            dq = dot(cast(ds, q.dtype), unit(k, k_inverse, COSINE), dq, PRECISION)
        dq *= scale
        if COSINE:
            dq, along = unit_backward(dq, q, q_inverse)
            scale_sum += along
        store_rows(dqkv, dq, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        at = softmaxes + (window * heads + head) * N + i
        tl.store(at, row_max, mask=i < N)
        tl.store(at + windows * heads * N, inverse_sum, mask=i < N)
        tl.store(at + 2 * windows * heads * N, delta, mask=i < N)
    store_scale(dscale, logit_scale, scale_sum, group * (tl.num_programs(0) // heads) + block, head, heads)


@triton.jit
def _load_softmaxes(softmaxes, window, windows, head, heads, i, N: tl.constexpr):
    """Loads row_max, 1 / row_sum and delta of queries; 0 beyond the window, where p and ds are then 0."""
    at = softmaxes + (window * heads + head) * N + i
    row_max = tl.load(at, mask=i < N, other=0.0)
    inverse_sum = tl.load(at + windows * heads * N, mask=i < N, other=0.0)
    return row_max, inverse_sum, tl.load(at + 2 * windows * heads * N, mask=i < N, other=0.0)


@triton.jit
def _large_windows_keys_kernel(
    dout, qkv, bias, index, logit_scale, pad, dqkv, dpad, softmaxes, geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv of a block of keys, and the group's sums for the padding."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, channels = tl.program_id(0) % heads, heads * D
    block, group = tl.program_id(0) // heads, tl.program_id(1)
    j = block * KEYS + tl.arange(0, KEYS)
    scale = load_scale(logit_scale, head, D)
    k_sum = tl.zeros([BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_D], tl.float32)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        image, k_row, k_exists, k_side = places(window, j, geometry, WINDOW_H, WINDOW_W)
        k, v = load_keys(qkv, pad, image, k_row, k_exists, channels, head, j, N, D, BLOCK_D)
        k_inverse = inverse_norms(k, COSINE)
        dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
        dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
        for start in range(0, N, QUERIES):
            i = start + tl.arange(0, QUERIES)
            _, q_row, q_exists, q_side = places(window, i, geometry, WINDOW_H, WINDOW_W)
            q = load_rows(qkv, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
            grad = load_rows(dout, image, q_row, q_exists, channels, head * D, D, BLOCK_D)
            biases = load_biases(bias, index, head, heads, entries, i, j, N)
            q_inverse = inverse_norms(q, COSINE)
            s = logits(q, k, q_inverse, k_inverse, q_side, k_side, biases, scale, j, N, SHIFTED, COSINE, PRECISION)
            row_max, inverse_sum, delta = _load_softmaxes(softmaxes, window, windows, head, heads, i, N)
            p = tl.exp(s - row_max[:, None]) * inverse_sum[:, None]
            dp = dot(grad, tl.trans(v), tl.zeros([QUERIES, KEYS], tl.float32), PRECISION)
            ds = cast(p * (dp - delta[:, None]), q.dtype)
            dv = dot(tl.trans(cast(p, grad.dtype)), grad, dv, PRECISION)
            dk = dot(tl.trans(ds), unit(q, q_inverse, COSINE), dk, PRECISION)
        dk, dv = store_keys(
            dk, dv, k, k_inverse, scale, dqkv, image, k_row, k_exists, j, channels, head, N, COSINE, D, BLOCK_D
        )
        if dpad is not None:
            k_sum += dk
            v_sum += dv
    store_padding(dpad, k_sum, v_sum, group * (tl.num_programs(0) // heads) + block, channels, head, D, BLOCK_D)


@triton.jit
def _large_windows_bias_kernel(
    dout, qkv, bias, index, logit_scale, pad, dbias, softmaxes, geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes a tile of the gradient of the logits, summed over the group's windows."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, channels, group = tl.program_id(0) % heads, heads * D, tl.program_id(1)
    block, across = tl.program_id(0) // heads, tl.cdiv(N, KEYS)
    i, j = block // across * QUERIES + tl.arange(0, QUERIES), block % across * KEYS + tl.arange(0, KEYS)
    biases = load_biases(bias, index, head, heads, entries, i, j, N)
    scale = load_scale(logit_scale, head, D)
    total = tl.zeros([QUERIES, KEYS], tl.float32)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        image, q_row, q_exists, q_side = places(window, i, geometry, WINDOW_H, WINDOW_W)
        _, k_row, k_exists, k_side = places(window, j, geometry, WINDOW_H, WINDOW_W)
        q = load_rows(qkv, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        grad = load_rows(dout, image, q_row, q_exists, channels, head * D, D, BLOCK_D)
        k, v = load_keys(qkv, pad, image, k_row, k_exists, channels, head, j, N, D, BLOCK_D)
        q_inverse, k_inverse = inverse_norms(q, COSINE), inverse_norms(k, COSINE)
        s = logits(q, k, q_inverse, k_inverse, q_side, k_side, biases, scale, j, N, SHIFTED, COSINE, PRECISION)
        row_max, inverse_sum, delta = _load_softmaxes(softmaxes, window, windows, head, heads, i, N)
        dp = dot(grad, tl.trans(v), tl.zeros([QUERIES, KEYS], tl.float32), PRECISION)
        total += tl.exp(s - row_max[:, None]) * inverse_sum[:, None] * (dp - delta[:, None])
    at = dbias + (group * heads + head).to(tl.int64) * N * N + i[:, None] * N + j[None, :]
    tl.store(at, total, mask=(i < N)[:, None] & (j < N)[None, :])


def _options(kernel: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the tile of a kernel, its warps and stages.

    In half precision the forward has the fastest of 10 settings on an H200: pipelined loads take registers, and 1.6
    times as long, and tiles of 32 keys fit a multiprocessor 4 times instead of 3. The backward was measured with 64
    keys and pipelined loads only; its tiles follow the forward's as far as the compiler's registers tell.
    """
    if dtype == torch.float32:
        return {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1}
    keys, stages = {"forward": (32, 1), "queries": (32, 1), "keys": (64, 1), "bias": (64, 2)}[kernel]
    return {"QUERIES": 64, "KEYS": keys, "num_warps": 4, "num_stages": stages}


def _dense(call: WindowCall) -> WindowCall:
    """Replaces a bias table by the dense bias (heads, n, n): a tile is read for every window."""
    qkv, bias, index, logit_scale, pad = call.inputs
    if index is not None:
        bias = bias.t().index_select(1, index.flatten().clamp(0, bias.shape[0] - 1))
        call.inputs = [qkv, bias.view(-1, *index.shape), None, logit_scale, pad]
    return call


def window_attention(qkv: Tensor, call: WindowCall) -> Tensor:
    out = torch.empty(*qkv.shape[:3], qkv.shape[3] // 3, dtype=qkv.dtype, device=qkv.device)
    options = _options("forward", qkv.dtype)
    blocks = cdiv(call.tokens, options["QUERIES"])
    _dense(call).launch(_large_windows_forward_kernel, *call.inputs, out, blocks=blocks, **options)
    return out


def window_attention_backward(
    grad: Tensor, qkv: Tensor, call: WindowCall, wanted: Container[str]
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Returns the gradient of qkv, partial sums of those of bias and logit_scale, and of that of the padding."""
    call, options = _dense(call), {name: _options(name, qkv.dtype) for name in ("queries", "keys", "bias")}
    tiles = {name: (cdiv(call.tokens, o["QUERIES"]), cdiv(call.tokens, o["KEYS"])) for name, o in options.items()}
    blocks = {"queries": tiles["queries"][0], "keys": tiles["keys"][1], "bias": tiles["bias"][0] * tiles["bias"][1]}
    groups = {name: call.programs(count)[0] for name, count in blocks.items()}
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sums = call.sums(wanted, groups["bias"], groups["queries"] * blocks["queries"])
    dpad = call.padding_sums(wanted, groups["keys"] * blocks["keys"])
    softmaxes = torch.empty(3, call.count, call.heads, call.tokens, dtype=torch.float32, device=qkv.device)

    def launch(name: str, kernel: Any, *results: Tensor | None) -> None:
        call.launch(kernel, grad, *call.inputs, *results, softmaxes, blocks=blocks[name], **options[name])

    launch("queries", _large_windows_queries_kernel, dqkv, sums.get("logit_scale"))
    launch("keys", _large_windows_keys_kernel, dqkv, dpad)
    if "bias" in sums:
        launch("bias", _large_windows_bias_kernel, sums["bias"])
    return dqkv, sums, dpad

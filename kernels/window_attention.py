"""`window_attention` in Triton: one kernel forward, one or two backward, and sums over windows.

A program computes one head of a block of queries for a group of windows in turn. It keeps its part of the bias, and in
the backward of the bias's gradient, in registers, and reads each window's tokens in place: shift, padding, partition
and mask are arithmetic on coordinates. A tile has all keys, so a row's softmax is complete within it. The backward
recomputes it from the logits: a saved logsumexp would be less exact where logits are large.

If one tile also has all queries (up to 64 tokens), the backward is one kernel. Otherwise a second kernel, with a block
of keys and all queries, computes the gradients of keys and values from the first one's row_max and row_sum. Where one
key has all the weight, its probability is only as exact as the logits of both kernels agree.

The tile of a program, for a window of 2 x 3 tokens in blocks of QUERIES = 4 and KEYS = 8; a token is one row of qkv,
located by `_places`:

            keys j     0  1  2  3  4  5 | beyond the window: -inf
    queries i    0     .  .  .  .  .  . | -  -      logits (QUERIES, KEYS) = scale q . k^T + bias, of one head;
                 1     .  .  .  .  .  . | -  -      plus APART across a border of the grid, in a shifted window
    block 0      2     .  .  .  .  .  . | -  -
                 3     .  .  .  .  .  . | -  -      softmax and both gemms with v (KEYS, D) stay in registers
    block 1      4 ...                              another program's, or none: 64 tokens are one block

Cost, with n tokens per window and rows of C channels. Forward: reads 3 rows and writes 1, and reads keys and values
again (from L2) for each further block of queries; 4 n C operations per token; 1 launch. Backward: reads 4 rows and
writes 3; 10 n C operations, or 14 n C in two kernels; 1 or 2 launches, 1 for all sums over groups of windows, and 2
that gather a table's gradient from the dense one. Partial sums of the bias: 4 n^2 bytes per program.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import cast, dot, inside_of
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2, tf32
from sgmim_fast.kernels.sums import column_sums, finished
from sgmim_fast.ops.primitives import Windows
from sgmim_fast.ops.target import target
from sgmim_fast.ops.window_attention import APART, MAX_LOGIT_SCALE, TINY

PROGRAMS = 8  # per multiprocessor: enough to hide latency, few enough to keep the partial sums small

_APART, _MAX_LOGIT_SCALE, _TINY = tl.constexpr(APART), tl.constexpr(MAX_LOGIT_SCALE), tl.constexpr(TINY)


@triton.jit
def _places(window, t, geometry, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Returns the first row of a window's image, and for each of the window's tokens its row in the image, whether it
    exists, and a number that differs across a border of the grid."""
    height, width, down, across, below, right = geometry
    # One division each for row and column. Both depend on the window: a loop would keep invariant ones in registers.
    first = window // across % down * (WINDOW_H * WINDOW_W)
    y = (first + t) // WINDOW_W
    x = first + window % across * WINDOW_W + t - y * WINDOW_W
    exists = (t < WINDOW_H * WINDOW_W) & (y < height) & (x < width)
    side = (y >= down * WINDOW_H - below).to(tl.int32) * 2 + (x >= across * WINDOW_W - right).to(tl.int32)
    image = (window // (down * across)).to(tl.int64) * height * width
    return image, (y + below) % height * width + (x + right) % width, exists, side


@triton.jit
def _load(x, image, row, exists, width, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads the columns from `start` of an image's rows, (rows, BLOCK_D), zero elsewhere, with 32-bit offsets."""
    d = tl.arange(0, BLOCK_D)
    at = x + (image * width + start) + (row[:, None] * width + d[None, :])
    return tl.load(at, mask=exists[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _load_padded(x, pad, image, row, exists, width, start, t, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`_load`, with `pad` for tokens of the window outside the grid."""
    value = _load(x, image, row, exists, width, start, D, BLOCK_D)
    if pad is not None:
        d = tl.arange(0, BLOCK_D)
        outside = cast(tl.load(pad + start + d, mask=d < D, other=0.0).to(tl.float32), x.dtype.element_ty)
        value = tl.where(((t < N) & (exists == 0))[:, None], outside[None, :], value)
    return value


@triton.jit
def _store(x, value, image, row, exists, width, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = x + (image * width + start) + (row[:, None] * width + d[None, :])
    tl.store(at, cast(value, x.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])


@triton.jit
def _biases(bias, index, head, heads, entries, i, j, N: tl.constexpr):
    """Loads the biases of one head, (queries, keys) in float32; None without bias."""
    biases = None
    if bias is not None:
        inside = (i < N)[:, None] & (j < N)[None, :]
        at = i[:, None] * N + j[None, :]
        if index is None:
            at = bias + head * N * N + at
        else:
            at = bias + inside_of(tl.load(index + at, mask=inside, other=0), entries) * heads + head
        biases = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return biases


@triton.jit
def _scale(logit_scale, head, D: tl.constexpr):
    """Returns the factor of a head's inner products or cosines."""
    if logit_scale is None:
        scale = 1 / tl.sqrt_rn(D + 0.0 * head)
    else:
        scale = tl.exp(tl.minimum(tl.load(logit_scale + head).to(tl.float32), _MAX_LOGIT_SCALE))
    return scale


@triton.jit
def _inverse_norm(x):
    x = x.to(tl.float32)
    return 1 / tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), _TINY)


@triton.jit
def _load_keys(
    qkv, pad, image, row, exists, channels, head, t, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Loads keys and values of the tokens t of a window."""
    start = channels + head * D
    k = _load_padded(qkv, pad, image, row, exists, 3 * channels, start, t, N, D, BLOCK_D)
    v = _load_padded(qkv, pad, image, row, exists, 3 * channels, channels + start, t, N, D, BLOCK_D)
    return k, v


@triton.jit
def _inverse_norms(x, COSINE: tl.constexpr):
    """Returns 1 / |x| of each row of x, or unused zeros if logits are not cosines."""
    inverse = tl.zeros([x.shape[0]], tl.float32)
    if COSINE:
        inverse = _inverse_norm(x)
    return inverse


@triton.jit
def _logits(
    q, k, q_inverse, k_inverse, q_side, k_side, biases, scale, j,
    N: tl.constexpr, SHIFTED: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the logits (queries, keys), -inf where the tile is wider than the window."""
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32), PRECISION)
    if COSINE:  # scale the inner products, so that no unit vector is rounded
        s *= (q_inverse * scale)[:, None] * k_inverse[None, :]
    else:
        s *= scale
    if biases is not None:
        s += biases
    if SHIFTED:
        s += tl.where(q_side[:, None] == k_side[None, :], 0.0, _APART)
    return tl.where((j < N)[None, :], s, float("-inf"))


@triton.jit
def _window_attention_forward_kernel(
    qkv, bias, index, logit_scale, pad, out, geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, group, channels = tl.program_id(0) % heads, tl.program_id(1), heads * D
    i = tl.program_id(0) // heads * QUERIES + tl.arange(0, QUERIES)
    j = tl.arange(0, KEYS)
    biases = _biases(bias, index, head, heads, entries, i, j, N)
    scale = _scale(logit_scale, head, D)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        image, q_row, q_exists, q_side = _places(window, i, geometry, WINDOW_H, WINDOW_W)
        _, k_row, k_exists, k_side = _places(window, j, geometry, WINDOW_H, WINDOW_W)
        q = _load(qkv, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        k, v = _load_keys(qkv, pad, image, k_row, k_exists, channels, head, j, N, D, BLOCK_D)
        q_inverse, k_inverse = _inverse_norms(q, COSINE), _inverse_norms(k, COSINE)
        s = _logits(q, k, q_inverse, k_inverse, q_side, k_side, biases, scale, j, N, SHIFTED, COSINE, PRECISION)
        p = tl.exp(s - tl.max(s, 1)[:, None])
        total = dot(cast(p, v.dtype), v, tl.zeros([QUERIES, BLOCK_D], tl.float32), PRECISION)
        _store(out, total / tl.sum(p, 1)[:, None], image, q_row, q_exists, channels, head * D, D, BLOCK_D)


@triton.jit
def _unit(x, inverse, COSINE: tl.constexpr):
    """Returns the vectors that the logits are linear in."""
    if COSINE:
        x = cast(x.to(tl.float32) * inverse[:, None], x.dtype)
    return x


@triton.jit
def _unit_backward(dx, x, inverse):
    """Returns the gradient of x from that of x / |x|, and per row that of the logarithm of the logits' factor."""
    x = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(dx * x, 1)
    return (dx - x * tl.where(inverse < 1 / _TINY, along, 0.0)[:, None]) * inverse[:, None], along


@triton.jit
def _store_keys(
    p, ds, grad, q, q_inverse, k, k_inverse, scale, dqkv, image, k_row, k_exists, j, channels, head,
    N: tl.constexpr, COSINE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of keys and values of a tile with all queries; returns their sums over the padding."""
    none = tl.zeros([k.shape[0], k.shape[1]], tl.float32)
    dv = dot(tl.trans(cast(p, grad.dtype)), grad, none, PRECISION)
    dk = dot(tl.trans(ds), _unit(q, q_inverse, COSINE), none, PRECISION) * scale
    if COSINE:
        dk, _ = _unit_backward(dk, k, k_inverse)
    _store(dqkv, dk, image, k_row, k_exists, 3 * channels, channels + head * D, D, BLOCK_D)
    _store(dqkv, dv, image, k_row, k_exists, 3 * channels, 2 * channels + head * D, D, BLOCK_D)
    outside = ((j < N) & (k_exists == 0))[:, None]
    return tl.sum(tl.where(outside, dk, 0.0), 0), tl.sum(tl.where(outside, dv, 0.0), 0)


@triton.jit
def _store_padding(dpad, dk, dv, program, channels, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a program's partial sums for the padding; a padded token has no query."""
    if dpad is not None:
        d = tl.arange(0, BLOCK_D)
        at = dpad + program.to(tl.int64) * 3 * channels + head * D + d
        tl.store(at, 0.0 * d, mask=d < D)
        tl.store(at + channels, dk, mask=d < D)
        tl.store(at + 2 * channels, dv, mask=d < D)


@triton.jit
def _window_attention_backward_kernel(
    dout, qkv, bias, index, logit_scale, pad, dqkv, dbias, dscale, dpad, softmaxes,
    geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dq of a block of queries, and the group's sums for bias and scale. If the block has all queries,
    computes dk and dv too; else stores row_max, 1 / row_sum and delta = sum(p dp) of each softmax."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, channels = tl.program_id(0) % heads, heads * D
    block, group = tl.program_id(0) // heads, tl.program_id(1)
    i = block * QUERIES + tl.arange(0, QUERIES)
    j = tl.arange(0, KEYS)
    biases = _biases(bias, index, head, heads, entries, i, j, N)
    scale = _scale(logit_scale, head, D)
    if dbias is not None:
        bias_sum = tl.zeros([QUERIES, KEYS], tl.float32)
    scale_sum = tl.zeros([QUERIES], tl.float32)
    k_sum = tl.zeros([BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_D], tl.float32)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        image, q_row, q_exists, q_side = _places(window, i, geometry, WINDOW_H, WINDOW_W)
        _, k_row, k_exists, k_side = _places(window, j, geometry, WINDOW_H, WINDOW_W)
        q = _load(qkv, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        k, v = _load_keys(qkv, pad, image, k_row, k_exists, channels, head, j, N, D, BLOCK_D)
        q_inverse, k_inverse = _inverse_norms(q, COSINE), _inverse_norms(k, COSINE)
        s = _logits(q, k, q_inverse, k_inverse, q_side, k_side, biases, scale, j, N, SHIFTED, COSINE, PRECISION)
        grad = _load(dout, image, q_row, q_exists, channels, head * D, D, BLOCK_D)
        row_max = tl.max(s, 1)
        p = tl.exp(s - row_max[:, None])
        inverse_sum = 1 / tl.sum(p, 1)
        p *= inverse_sum[:, None]
        dp = dot(grad, tl.trans(v), tl.zeros([QUERIES, KEYS], tl.float32), PRECISION)
        delta = tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])
        if dbias is not None:
            bias_sum += ds
        ds = cast(ds, q.dtype)
        dq = dot(ds, _unit(k, k_inverse, COSINE), tl.zeros([QUERIES, BLOCK_D], tl.float32), PRECISION) * scale
        if COSINE:
            dq, along = _unit_backward(dq, q, q_inverse)
            scale_sum += along
        _store(dqkv, dq, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        if softmaxes is None:
            dk, dv = _store_keys(
                p, ds, grad, q, q_inverse, k, k_inverse, scale, dqkv, image, k_row, k_exists, j, channels, head,
                N, COSINE, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            if dpad is not None:
                k_sum += dk
                v_sum += dv
        else:
            at = softmaxes + (window * heads + head) * N + i
            tl.store(at, row_max, mask=i < N)
            tl.store(at + windows * heads * N, inverse_sum, mask=i < N)
            tl.store(at + 2 * windows * heads * N, delta, mask=i < N)
    if dbias is not None:
        at = dbias + (group * heads + head).to(tl.int64) * N * N + i[:, None] * N + j[None, :]
        tl.store(at, bias_sum, mask=(i < N)[:, None] & (j < N)[None, :])
    if dscale is not None:
        clamped = tl.load(logit_scale + head).to(tl.float32) > _MAX_LOGIT_SCALE
        program = group * (tl.num_programs(0) // heads) + block
        tl.store(dscale + program * heads + head, tl.where(clamped, 0.0, tl.sum(scale_sum, 0)))
    if softmaxes is None:
        _store_padding(dpad, k_sum, v_sum, group, channels, head, D, BLOCK_D)


@triton.jit
def _window_attention_keys_kernel(
    dout, qkv, bias, index, logit_scale, pad, dqkv, dpad, softmaxes, geometry, windows, per_program, heads, entries,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dk and dv of a block of keys, with all queries."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    COSINE: tl.constexpr = logit_scale is not None
    head, channels = tl.program_id(0) % heads, heads * D
    block, group = tl.program_id(0) // heads, tl.program_id(1)
    i = tl.arange(0, QUERIES)
    j = block * KEYS + tl.arange(0, KEYS)
    biases = _biases(bias, index, head, heads, entries, i, j, N)
    scale = _scale(logit_scale, head, D)
    k_sum = tl.zeros([BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_D], tl.float32)
    for window in range(group * per_program, tl.minimum((group + 1) * per_program, windows)):
        image, q_row, q_exists, q_side = _places(window, i, geometry, WINDOW_H, WINDOW_W)
        _, k_row, k_exists, k_side = _places(window, j, geometry, WINDOW_H, WINDOW_W)
        q = _load(qkv, image, q_row, q_exists, 3 * channels, head * D, D, BLOCK_D)
        k, v = _load_keys(qkv, pad, image, k_row, k_exists, channels, head, j, N, D, BLOCK_D)
        q_inverse, k_inverse = _inverse_norms(q, COSINE), _inverse_norms(k, COSINE)
        s = _logits(q, k, q_inverse, k_inverse, q_side, k_side, biases, scale, j, N, SHIFTED, COSINE, PRECISION)
        grad = _load(dout, image, q_row, q_exists, channels, head * D, D, BLOCK_D)
        at = softmaxes + (window * heads + head) * N + i
        row_max = tl.load(at, mask=i < N, other=0.0)
        inverse_sum = tl.load(at + windows * heads * N, mask=i < N, other=0.0)
        delta = tl.load(at + 2 * windows * heads * N, mask=i < N, other=0.0)
        p = tl.exp(s - row_max[:, None]) * inverse_sum[:, None]
        dp = dot(grad, tl.trans(v), tl.zeros([QUERIES, KEYS], tl.float32), PRECISION)
        ds = cast(p * (dp - delta[:, None]), q.dtype)
        dk, dv = _store_keys(
            p, ds, grad, q, q_inverse, k, k_inverse, scale, dqkv, image, k_row, k_exists, j, channels, head,
            N, COSINE, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        if dpad is not None:
            k_sum += dk
            v_sum += dv
    program = group * (tl.num_programs(0) // heads) + block
    _store_padding(dpad, k_sum, v_sum, program, channels, head, D, BLOCK_D)


@triton.jit
def _window_attention_entries_kernel(
    dense, index, partials, positions, per_program, entries, heads,
    ENTRIES: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums `dense` (heads, positions) over a range of positions by entry, in gemms with a matrix of 0 and 1. Positions
    next to each other have entries next to each other, so most blocks have none of the program's, and are skipped."""
    e = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    h = tl.arange(0, HEADS)
    total = tl.zeros([ENTRIES, HEADS], tl.float32)
    first = tl.program_id(1) * per_program
    last = tl.minimum(first + per_program, positions)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entry = tl.load(index + at, mask=at < last, other=-1)
        chosen = e[:, None] == entry[None, :]
        if tl.max(tl.max(chosen.to(tl.int32), 1), 0) > 0:
            inside = (at < last)[:, None] & (h < heads)[None, :]
            values = tl.load(dense + h[None, :] * positions + at[:, None], mask=inside, other=0.0)
            total = dot(chosen.to(tl.float32), values, total, "ieee")
    at = (tl.program_id(1) * entries + e)[:, None] * heads + h[None, :]
    tl.store(partials + at, total, mask=(e < entries)[:, None] & (h < heads)[None, :])


def table_sum(dense: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """Sums the dense gradient (heads * n * n,) to a table's (entries, heads), in partial sums. Cost: 1 launch."""
    positions, (entries, heads) = index.numel(), table.shape
    per_program = max(256, cdiv(cdiv(positions, 16), 64) * 64)
    chunks = cdiv(positions, per_program)
    partials = torch.empty(chunks, entries * heads, dtype=torch.float32, device=dense.device)
    launch(
        _window_attention_entries_kernel,
        (cdiv(entries, 32), chunks),
        dense,
        index,
        partials,
        positions,
        per_program,
        entries,
        heads,
        ENTRIES=32,
        HEADS=max(16, next_power_of_2(heads)),
        BLOCK=64,
    )
    return partials


def _tile_sizes(tokens: int, dtype: torch.dtype, heavy: bool) -> tuple[int, int, int, int]:
    """Returns the tokens of a tile that has all of them, the queries and the keys of a tile with a block, and the
    warps.

    Tiles are as large as registers allow; up to 64 tokens are one tile. heavy: whether shift, cosines or padding need
    registers too.
    """
    whole = max(16, next_power_of_2(tokens))
    if whole <= 64:
        return whole, whole, whole, 8 if dtype == torch.float32 else 4
    return whole, 16 if heavy else 32, (1 << 13) // whole, 8


class _Windows:
    """The windows of a call, and the arguments that all of its kernels share."""

    def __init__(self, qkv: Tensor, windows: Windows):
        bias, index, logit_scale, pad, heads, window, shift = windows
        batch, height, width, channels = qkv.shape
        down, across = cdiv(height, window[0]), cdiv(width, window[1])
        self.geometry = height, width, down, across, *shift
        self.heads, self.tokens, self.count = heads, window[0] * window[1], batch * down * across
        self.device, self.entries = qkv.device, 1 if bias is None else bias.shape[0]
        padded = height % window[0] > 0 or width % window[1] > 0
        tensors = qkv, bias, index, logit_scale, pad if padded else None
        self.inputs = [None if t is None else t.contiguous() for t in tensors]
        heavy = padded or any(shift) or logit_scale is not None
        self.whole, self.queries, self.keys, warps = _tile_sizes(self.tokens, qkv.dtype, heavy)
        self.options: dict[str, Any] = {
            "WINDOW_H": window[0],
            "WINDOW_W": window[1],
            "SHIFTED": any(shift),
            "D": channels // 3 // heads,
            "BLOCK_D": max(16, next_power_of_2(channels // 3 // heads)),
            "PRECISION": tf32(),
            "num_warps": warps,
            "num_stages": 1,
        }
        # 3 blocks of 4 warps per multiprocessor instead of 2: up to 12 % faster on an H200, although it spills
        self.backward_options = {"maxnreg": 168} if self.whole == 64 and qkv.dtype.itemsize == 2 else {}

    def programs(self, block: int) -> tuple[int, int, int]:
        """Returns how many blocks of `block` tokens a window has, how many groups there are, and windows per group."""
        blocks = cdiv(self.tokens, block)
        groups = cdiv(PROGRAMS * target(self.device).multiprocessors, self.heads * blocks)
        each = cdiv(self.count, max(1, min(groups, self.count)))
        return blocks, cdiv(self.count, max(1, each)), each

    def launch(self, kernel: Any, *args: Any, queries: int, keys: int, **options: Any) -> None:
        blocks, groups, each = self.programs(min(queries, keys))
        launch(
            kernel, (self.heads * blocks, groups), *args, self.geometry, self.count, each, self.heads,
            self.entries,
            QUERIES=queries, KEYS=keys, **self.options, **options,
        )  # fmt: skip


def window_attention(qkv: Tensor, w: Windows) -> Tensor:
    windows = _Windows(qkv, w)
    out = torch.empty(*qkv.shape[:3], qkv.shape[3] // 3, dtype=qkv.dtype, device=qkv.device)
    windows.launch(_window_attention_forward_kernel, *windows.inputs, out, queries=windows.queries, keys=windows.whole)
    return out


def window_attention_backward(
    grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    windows = _Windows(qkv, w)
    grad = grad.to(qkv.dtype).contiguous()
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    one_kernel = windows.queries >= windows.tokens
    (blocks, groups, _), (key_blocks, key_groups, _) = (windows.programs(n) for n in (windows.queries, windows.keys))

    def partials(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=qkv.device)

    sums: dict[str, Tensor] = {}
    if "bias" in wanted:
        sums["bias"] = partials(groups, w.heads * windows.tokens**2)
    if "logit_scale" in wanted:
        sums["logit_scale"] = partials(groups * blocks, w.heads)
    dpad = None
    if windows.inputs[-1] is not None and ("pad" in wanted or "qkv_bias" in wanted):
        dpad = partials(groups if one_kernel else key_groups * key_blocks, qkv.shape[3])
    softmaxes = None if one_kernel else partials(3, windows.count, w.heads, windows.tokens)
    windows.launch(
        _window_attention_backward_kernel, grad, *windows.inputs, dqkv, sums.get("bias"), sums.get("logit_scale"),
        dpad if one_kernel else None, softmaxes,
        queries=windows.queries, keys=windows.whole, **windows.backward_options,
    )  # fmt: skip
    if not one_kernel and ("qkv" in wanted or dpad is not None):
        windows.launch(
            _window_attention_keys_kernel,
            grad,
            *windows.inputs,
            dqkv,
            dpad,
            softmaxes,
            queries=windows.whole,
            keys=windows.keys,
        )
    return dqkv, sums | other_sums(dqkv, w, sums, dpad, wanted)


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

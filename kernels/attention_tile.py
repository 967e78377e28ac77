"""A tile of window attention, which is computed by the kernels of `window_attention` and `large_windows`: loads and
stores in place, logits, and gradients, as device functions; and the arguments of a call that all kernels share.

A window's tokens are read in place: shift, padding, partition and mask are arithmetic on coordinates. The tile of a
program, for a window of 2 x 3 tokens in blocks of QUERIES = 4 and KEYS = 8; a token is one row of qkv, located by
`places`:

            keys j     0  1  2  3  4  5 | beyond the window: -inf
    queries i    0     .  .  .  .  .  . | -  -      logits (QUERIES, KEYS) = scale q . k^T + bias, of one head;
                 1     .  .  .  .  .  . | -  -      plus APART across a border of the grid, in a shifted window
    block 0      2     .  .  .  .  .  . | -  -
                 3     .  .  .  .  .  . | -  -      softmax and gemms with k and v (KEYS, D) stay in registers
    block 1      4 ...
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
from sgmim_fast.ops.primitives import Windows
from sgmim_fast.ops.target import target
from sgmim_fast.ops.window_attention import APART, MAX_LOGIT_SCALE, TINY

PROGRAMS = 8  # per multiprocessor: enough to hide latency, few enough to keep the partial sums small

_APART, _MAX_LOGIT_SCALE, _TINY = tl.constexpr(APART), tl.constexpr(MAX_LOGIT_SCALE), tl.constexpr(TINY)


@triton.jit
def places(window, t, geometry, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
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
def load_rows(x, image, row, exists, width, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads the columns from `start` of an image's rows, (rows, BLOCK_D), zero elsewhere, with 32-bit offsets."""
    d = tl.arange(0, BLOCK_D)
    at = x + (image * width + start) + (row[:, None] * width + d[None, :])
    return tl.load(at, mask=exists[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _load_padded(x, pad, image, row, exists, width, start, t, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`load_rows`, with `pad` for tokens of the window outside the grid."""
    value = load_rows(x, image, row, exists, width, start, D, BLOCK_D)
    if pad is not None:
        d = tl.arange(0, BLOCK_D)
        outside = cast(tl.load(pad + start + d, mask=d < D, other=0.0).to(tl.float32), x.dtype.element_ty)
        value = tl.where(((t < N) & (exists == 0))[:, None], outside[None, :], value)
    return value


@triton.jit
def store_rows(x, value, image, row, exists, width, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = x + (image * width + start) + (row[:, None] * width + d[None, :])
    tl.store(at, cast(value, x.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])


@triton.jit
def load_biases(bias, index, head, heads, entries, i, j, N: tl.constexpr):
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
def load_scale(logit_scale, head, D: tl.constexpr):
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
def load_keys(qkv, pad, image, row, exists, channels, head, t, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads keys and values of the tokens t of a window."""
    start = channels + head * D
    k = _load_padded(qkv, pad, image, row, exists, 3 * channels, start, t, N, D, BLOCK_D)
    v = _load_padded(qkv, pad, image, row, exists, 3 * channels, channels + start, t, N, D, BLOCK_D)
    return k, v


@triton.jit
def inverse_norms(x, COSINE: tl.constexpr):
    """Returns 1 / |x| of each row of x, or unused zeros if logits are not cosines."""
    inverse = tl.zeros([x.shape[0]], tl.float32)
    if COSINE:
        inverse = _inverse_norm(x)
    return inverse


@triton.jit
def logits(
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
def unit(x, inverse, COSINE: tl.constexpr):
    """Returns the vectors that the logits are linear in."""
    if COSINE:
        x = cast(x.to(tl.float32) * inverse[:, None], x.dtype)
    return x


@triton.jit
def unit_backward(dx, x, inverse):
    """Returns the gradient of x from that of x / |x|, and per row that of the logarithm of the logits' factor."""
    x = x.to(tl.float32) * inverse[:, None]
    along = tl.sum(dx * x, 1)
    return (dx - x * tl.where(inverse < 1 / _TINY, along, 0.0)[:, None]) * inverse[:, None], along


@triton.jit
def store_keys(
    dk, dv, k, k_inverse, scale, dqkv, image, k_row, k_exists, j, channels, head,
    N: tl.constexpr, COSINE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a tile's values and keys, given ds^T . q as dk; returns their sums over the padding."""
    dk *= scale
    if COSINE:
        dk, _ = unit_backward(dk, k, k_inverse)
    store_rows(dqkv, dk, image, k_row, k_exists, 3 * channels, channels + head * D, D, BLOCK_D)
    store_rows(dqkv, dv, image, k_row, k_exists, 3 * channels, 2 * channels + head * D, D, BLOCK_D)
    outside = ((j < N) & (k_exists == 0))[:, None]
    return tl.sum(tl.where(outside, dk, 0.0), 0), tl.sum(tl.where(outside, dv, 0.0), 0)


@triton.jit
def store_scale(dscale, logit_scale, scale_sum, program, head, heads):
    """Stores a program's partial sum for the logits' factor, whose gradient is 0 where it is clamped."""
    if dscale is not None:
        clamped = tl.load(logit_scale + head).to(tl.float32) > _MAX_LOGIT_SCALE
        tl.store(dscale + program * heads + head, tl.where(clamped, 0.0, tl.sum(scale_sum, 0)))


@triton.jit
def store_padding(dpad, dk, dv, program, channels, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a program's partial sums for the padding; a padded token has no query."""
    if dpad is not None:
        d = tl.arange(0, BLOCK_D)
        at = dpad + program.to(tl.int64) * 3 * channels + head * D + d
        tl.store(at, 0.0 * d, mask=d < D)
        tl.store(at + channels, dk, mask=d < D)
        tl.store(at + 2 * channels, dv, mask=d < D)


class WindowCall:
    """The windows of a call, and the arguments that all kernels share.

    Each program computes one head of a block of a window's tokens, or of its logits, for a group of windows in turn.
    """

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
        self.options: dict[str, Any] = {
            "WINDOW_H": window[0],
            "WINDOW_W": window[1],
            "SHIFTED": any(shift),
            "D": channels // 3 // heads,
            "BLOCK_D": max(16, next_power_of_2(channels // 3 // heads)),
            "PRECISION": tf32(),
        }

    def programs(self, blocks: int) -> tuple[int, int]:
        """Returns the number of groups and the windows per group, for windows of so many blocks."""
        groups = cdiv(PROGRAMS * target(self.device).multiprocessors, self.heads * blocks)
        each = max(1, cdiv(self.count, max(1, min(groups, self.count))))
        return cdiv(self.count, each), each

    def sums(self, wanted: Container[str], bias: int, logit_scale: int) -> dict[str, Tensor]:
        """Allocates so many partial sums of the gradients of bias and logit_scale, if they are wanted."""
        sizes = {"bias": (bias, self.heads * self.tokens**2), "logit_scale": (logit_scale, self.heads)}
        return {name: self._partials(*size) for name, size in sizes.items() if name in wanted}

    def padding_sums(self, wanted: Container[str], count: int) -> Tensor | None:
        """Allocates so many partial sums of the gradient of the padding, if there is any and it is wanted."""
        qkv, *_, pad = self.inputs
        if pad is None or ("pad" not in wanted and "qkv_bias" not in wanted):
            return None
        return self._partials(count, qkv.shape[3])

    def _partials(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def launch(self, kernel: Any, *args: Any, blocks: int = 1, **options: Any) -> None:
        groups, each = self.programs(blocks)
        launch(
            kernel, (self.heads * blocks, groups), *args, self.geometry, self.count, each, self.heads, self.entries,
            **self.options, **options,
        )  # fmt: skip

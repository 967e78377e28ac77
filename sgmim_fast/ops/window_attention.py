"""`window_attention`: self-attention inside the windows of a token grid (Swin, SwinV2), or over all of it (ViT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op, absent
from sgmim_fast.ops._plain import wide_dtype

APART = -100.0  # added to the logits of tokens that only the cyclic shift has made neighbours, as in timm
MAX_LOGIT_SCALE = math.log(1.0 / 0.01)
TINY = 1e-12  # least norm of a vector whose cosine is taken, as in torch.nn.functional.normalize


def window_attention(
    qkv: Tensor,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int] = (0, 0),
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    logit_scale: Tensor | None = None,
    pad: Tensor | None = None,
) -> Tensor:
    """Softmax attention of every token over the tokens of its window; the grid is neither rolled nor cut up.

    Plain PyTorch, as in timm: roll by -shift, pad below and right to whole windows, cut into windows,
    `softmax(q @ k.mT * d**-0.5 + bias + mask) @ v` per head, and all of it back. The mask is -100 where the cyclic
    shift has brought tokens of opposite borders into one window. One window over all tokens is a ViT's attention.

    Args:
        qkv: (B, H, W, 3 * heads * d), floating point: query, key and value of each token, each split by heads.
        heads: attention heads.
        window: (h, w) of a window in tokens, n = h * w tokens. Windows at the lower and right border may stick out.
        shift: (down, right) by which the windows are moved, each below the window's side; 0: not.
        bias: added to the logits: (heads, n, n) where there is no index, else (entries, heads), a relative position
            bias table of which query i and key j use row index[i, j]. None: nothing is added.
        index: (n, n) int64, rows of `bias`.
        logit_scale: (heads,): SwinV2's cosine attention. Queries and keys get unit length, and the cosines are
            multiplied by e^min(logit_scale, log 100) in place of d**-0.5. None: dot products.
        pad: (3 * heads * d,), what tokens outside the grid have for qkv: the bias of the projection, since timm pads
            before it. They take part as keys and values. None: zeros.

    Returns:
        (B, H, W, heads * d), dtype of `qkv`; computed in float32 at least. Differentiable in `qkv`, `bias`,
        `logit_scale` and `pad`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.

    Source: Swin (arXiv 2103.14030), SwinV2 (arXiv 2111.09883), timm's arithmetic.
    """
    return _op(qkv, bias, index, logit_scale, pad, heads, list(window), list(shift))


def _check_arguments(
    qkv: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    logit_scale: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
) -> None:
    _check.floating("qkv", qkv)
    if qkv.ndim != 4:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (B, H, W, 3 * channels)")
    if heads < 1 or qkv.shape[3] % (3 * heads):
        raise ValueError(f"heads is {heads}; expected a divisor of the channels, qkv has 3 * {qkv.shape[3] / 3:g}")
    for name, pair, low in (("window", window, 1), ("shift", shift, 0)):
        if len(pair) != 2 or min(pair) < low:
            raise ValueError(f"{name} is {tuple(pair)}; expected two integers from {low}")
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(f"shift is {tuple(shift)}; expected less than the window {tuple(window)}")
    n = window[0] * window[1]
    if index is not None:
        if bias is None:
            raise ValueError("index is given without bias; expected both")
        _check.shape("index", index, (n, n), "(tokens of a window, the same)")
        if index.dtype != torch.int64:
            raise TypeError(f"index has dtype {index.dtype}; expected torch.int64")
    if index is None:
        _check.parameter("bias", bias, (heads, n, n), "(heads, tokens of a window, the same)")
    else:
        _check.parameter("bias", bias, (None, heads), "(entries, heads)")
    _check.parameter("logit_scale", logit_scale, (heads,), "(heads,)")
    _check.parameter("pad", pad, (qkv.shape[3],), "(3 * channels,)")


def most_tokens_on_a_gpu(dtype: torch.dtype) -> int:
    """Of a window in the Triton kernels, whose tiles have complete rows of logits; in float32 registers hold less."""
    return 64 if dtype == torch.float32 else 256


def factor(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What cosines are multiplied by, per head."""
    return logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()


def logit_scale_gradient(d_log: Tensor, logit_scale: Tensor) -> Tensor:
    """From the gradient of the clamped value: where it is clamped, 0."""
    return torch.where(logit_scale <= MAX_LOGIT_SCALE, d_log, 0).to(logit_scale.dtype)


class _Windows:
    """The windows as tensors (B, down, across, heads, n, d): copies, for the plain implementation."""

    def __init__(self, qkv: Tensor, pad: Tensor | None, heads: int, window: Sequence[int], shift: Sequence[int]):
        self.size, self.heads, self.window, self.shift, self.pad = qkv.shape[1:3], heads, window, shift, pad
        self.dtype = wide_dtype(qkv)

    def cut(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B, down, across, n, C); what sticks out is `pad`, or 0."""
        (height, width), (h, w) = self.size, self.window
        x = x.to(self.dtype).roll([-s for s in self.shift], (1, 2))
        below, right = -height % h, -width % w
        x = F.pad(x, (0, 0, 0, right, 0, below))
        if pad is not None and (below or right):
            x = torch.where(self.inside(x)[..., None], x, pad.to(x.dtype))
        return x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3).flatten(3, 4)

    def inside(self, x: Tensor) -> Tensor:
        """Which tokens of the shifted, padded grid (B, H', W', C) exist, (H', W')."""
        rows, columns = (torch.arange(x.shape[i + 1], device=x.device) < self.size[i] for i in (0, 1))
        return rows[:, None] & columns

    def join(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Back: (B, down, across, n, C) -> (B, H, W, C), and the sum (C,) of what belongs to the padding."""
        x = x.unflatten(3, tuple(self.window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        outside = torch.where(self.inside(x)[..., None], 0, x).sum((0, 1, 2))
        return x[:, : self.size[0], : self.size[1]].roll(list(self.shift), (1, 2)), outside

    def split(self, x: Tensor) -> Tensor:
        """(..., n, heads * d) -> (..., heads, n, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(-2, -3).flatten(-2)

    def mask(self, device: torch.device) -> Tensor:
        """(down, across, 1, n, n): APART between tokens that are no neighbours, else 0."""
        groups = []
        for size, window, shift in zip(self.size, self.window, self.shift, strict=True):
            whole = size + -size % window
            groups.append((torch.arange(whole, device=device) >= whole - shift).view(-1, window))
        down, across = groups
        group = (2 * down[:, None, :, None] + across[None, :, None, :]).flatten(2)
        return torch.where(group[..., None] == group[..., None, :], 0.0, APART).to(self.dtype)[:, :, None]

    def operands(self, qkv: Tensor, logit_scale: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Queries, keys and values as they come, and what the queries are multiplied by, (heads, 1, 1) or ()."""
        parts = tuple(self.split(x) for x in self.cut(qkv, self.pad).chunk(3, -1))
        if logit_scale is None:
            return parts, torch.full((), parts[0].shape[-1] ** -0.5, dtype=self.dtype, device=qkv.device)
        return parts, factor(logit_scale, self.dtype)[:, None, None]

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, index: Tensor | None) -> Tensor:
        logits = q @ k.mT
        if bias is not None:
            logits = logits + dense_bias(bias, index).to(self.dtype)
        return logits + self.mask(q.device) if any(self.shift) else logits


def dense_bias(bias: Tensor, index: Tensor | None) -> Tensor:
    """(heads, n, n)."""
    return bias if index is None else bias[index].permute(2, 0, 1)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x|, and |x|."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp_min(TINY), norm


def _unit_backward(dy: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    along = torch.where(norm > TINY, (dy * y).sum(-1, keepdim=True), 0)
    return (dy - y * along) / norm.clamp_min(TINY)


def _forward(
    qkv: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    logit_scale: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: list[int],
    shift: list[int],
) -> Tensor:
    if index is not None:
        _check.rows("index", index, bias.shape[0], distinct=False)
    windows = _Windows(qkv, pad, heads, window, shift)
    (q, k, v), scale = windows.operands(qkv, logit_scale)
    if logit_scale is not None:
        q, k = _unit(q)[0], _unit(k)[0]
    p = windows.logits(q * scale, k, bias, index).softmax(-1)
    return windows.join(windows.merge(p @ v))[0].to(qkv.dtype, copy=True).contiguous()


def _backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    logit_scale: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: list[int],
    shift: list[int],
    needs: list[bool],
) -> list[Tensor]:
    windows = _Windows(qkv, pad, heads, window, shift)
    (q, k, v), scale = windows.operands(qkv, logit_scale)
    if logit_scale is not None:
        (q, q_norm), (k, k_norm) = _unit(q), _unit(k)
    p = windows.logits(q * scale, k, bias, index).softmax(-1)
    dout = windows.split(windows.cut(grad))
    dp = dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dv = p.mT @ dout
    dq, dk = ds @ k * scale, ds.mT @ (q * scale)
    grads = [absent(qkv) for _ in needs]
    if needs[2]:
        d_log = (dq * q).sum((0, 1, 2, 4, 5))
        grads[2] = logit_scale_gradient(d_log, logit_scale)
    if logit_scale is not None:
        dq, dk = _unit_backward(dq, q, q_norm), _unit_backward(dk, k, k_norm)
    dqkv, dpad = windows.join(torch.cat([windows.merge(x) for x in (dq, dk, dv)], -1))
    if needs[0]:
        grads[0] = dqkv.to(qkv.dtype).contiguous()
    if needs[1]:
        dense = ds.sum((0, 1, 2))
        if index is not None:
            dense = dense.flatten(1).mT
            dense = dense.new_zeros(bias.shape).index_add_(0, index.flatten(), dense)
        grads[1] = dense.to(bias.dtype).contiguous()
    if needs[3]:
        grads[3] = dpad.to(pad.dtype)
    return grads


def _fake(qkv, bias, index, logit_scale, pad, heads, window, shift):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


_op = Op(
    "window_attention",
    "(Tensor qkv, Tensor? bias, Tensor? index, Tensor? logit_scale, Tensor? pad, SymInt heads, SymInt[] window, "
    "SymInt[] shift) -> Tensor",
    forward=_forward,
    fake=_fake,
    check=_check_arguments,
)


def _save(ctx: Any, inputs: tuple, result: Tensor) -> None:
    *tensors, ctx.heads, ctx.window, ctx.shift = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    flags = [needs[0], needs[1], needs[3], needs[4]]
    grads = _op.backward(grad, *ctx.saved_tensors, ctx.heads, ctx.window, ctx.shift, flags)
    return grads[0], grads[1], None, grads[2], grads[3]


def _fake_backward(grad, qkv, bias, index, logit_scale, pad, heads, window, shift, needs):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else absent(qkv)
        for t, need in zip((qkv, bias, logit_scale, pad), needs, strict=True)
    ]


_op.differentiable(
    "(Tensor grad, Tensor qkv, Tensor? bias, Tensor? index, Tensor? logit_scale, Tensor? pad, SymInt heads, "
    "SymInt[] window, SymInt[] shift, bool[] needs) -> Tensor[]",
    backward=_backward,
    fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)

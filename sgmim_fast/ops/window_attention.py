"""`window_attention`: self-attention inside the windows of a token grid (Swin, SwinV2), or over all of it (ViT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.primitives import Gradients, Primitives, Request, Windows

APART = -100.0  # added to the logits of tokens that only the cyclic shift has made neighbours, as in timm
MAX_LOGIT_SCALE = math.log(1.0 / 0.01)
TINY = 1e-12  # least norm of a vector whose cosine is taken, as in torch.nn.functional.normalize


class Arguments(NamedTuple):
    """Of the op, as of `window_attention`."""

    qkv: Tensor
    bias: Tensor | None
    index: Tensor | None
    logit_scale: Tensor | None
    pad: Tensor | None
    heads: int
    window: list[int]
    shift: list[int]


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


def _check_arguments(a: Arguments) -> None:
    _check.floating("qkv", a.qkv)
    if a.qkv.ndim != 4:
        raise ValueError(f"qkv has shape {tuple(a.qkv.shape)}; expected (B, H, W, 3 * channels)")
    check_windows(a.qkv.shape[3], Windows(*a[1:]))
    _check.parameter("pad", a.pad, (a.qkv.shape[3],), "(3 * channels,)")


def check_windows(channels: int, windows: Windows) -> None:
    """channels: of queries, keys and values together."""
    bias, index, logit_scale, _, heads, window, shift = windows
    if heads < 1 or channels % (3 * heads):
        raise ValueError(f"heads is {heads}; expected a divisor of the channels, qkv has 3 * {channels / 3:g}")
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


def most_tokens_on_a_gpu(dtype: torch.dtype) -> int:
    """Of a window in the Triton kernels, whose tiles have complete rows of logits; in float32 registers hold less."""
    return 64 if dtype == torch.float32 else 256


def factor(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What cosines are multiplied by, per head."""
    return logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()


def logit_scale_gradient(d_log: Tensor, logit_scale: Tensor) -> Tensor:
    """From the gradient of the clamped value: where it is clamped, 0."""
    return torch.where(logit_scale <= MAX_LOGIT_SCALE, d_log, 0).to(logit_scale.dtype)


def _forward(p: Primitives, a: Arguments) -> Tensor:
    return p.window_attention(a.qkv, Windows(*a[1:]))


def _backward(p: Primitives, a: Arguments, _: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    gradients["qkv"], sums = p.window_attention_backward(grad, a.qkv, Windows(*a[1:]), gradients.wanted)
    gradients.sums(sums)


def request(qkv: Tensor, windows: Windows) -> Request:
    return Request((qkv.dtype,), window=(windows.window[0] * windows.window[1], qkv.shape[3] // 3 // windows.heads))


def look_at_indices(a: Any) -> None:
    if a.index is not None:
        _check.rows("index", a.index, a.bias.shape[0], distinct=False)


_op = Op(
    "window_attention",
    Arguments,
    _forward,
    backward=_backward,
    fake=lambda a: a.qkv.new_empty(*a.qkv.shape[:3], a.qkv.shape[3] // 3),
    check=_check_arguments,
    request=lambda a: request(a.qkv, Windows(*a[1:])),
    indices=look_at_indices,
)

"""`window_attention`: self-attention within windows of a token grid (Swin, SwinV2), or over the whole grid (ViT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.primitives import Gradients, Primitives, Request, Windows

APART = -100.0  # added to logits between tokens that are neighbours only by the cyclic shift, as in timm
MAX_LOGIT_SCALE = math.log(1.0 / 0.01)
ONE_TILE = 64  # most tokens of a window that a GPU's kernel holds in one tile
TINY = 1e-12  # lower bound of the norm of a vector whose cosine is taken, as in torch.nn.functional.normalize


class Arguments(NamedTuple):
    """The operator's arguments, see `window_attention`."""

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
    """Softmax attention of every token over the tokens of its window, without copying the grid into windows.

    Plain PyTorch, as in timm: roll by -shift, pad below and right to whole windows, partition into windows,
    `softmax(q @ k.mT * d**-0.5 + bias + mask) @ v` per head, and reverse. The mask is -100 where the cyclic shift has
    brought tokens of opposite borders into one window. One window over all tokens is a ViT's attention.

    Args:
        qkv: (B, H, W, 3 * heads * d), floating point: query, key and value of each token, each split by heads.
        heads: number of attention heads.
        window: (h, w), size of a window in tokens; n = h * w. Windows at the lower and right border may stick out.
        shift: (down, right), cyclic shift of the windows in tokens, less than the window's side; 0: none.
        bias: added to the logits: without `index` (heads, n, n), else (entries, heads), a relative position bias table
            whose row index[i, j] belongs to query i and key j. None: nothing is added.
        index: (n, n) int64, rows of `bias`.
        logit_scale: (heads,), for SwinV2's cosine attention: queries and keys are normalised to unit length, and
            the cosines multiplied by e^min(logit_scale, log 100) instead of d**-0.5. None: dot products.
        pad: (3 * heads * d,), qkv of the tokens outside the grid, which take part as keys and values. It is the bias of
            the projection if, as in timm, the padding precedes it. None: zeros.

    Returns:
        (B, H, W, heads * d), dtype of `qkv`; sums and softmax are computed in float32 or wider. In bfloat16 and float16
        the operands of gemms, also the probabilities and the gradients of the logits, may be rounded to that dtype.
        Differentiable in `qkv`, `bias`, `logit_scale` and `pad`.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.

    Source: Swin (arXiv 2103.14030), SwinV2 (arXiv 2111.09883), timm's arithmetic.
    """
    sizes = _check.pair("window", window), _check.pair("shift", shift)
    return _op(qkv, bias, index, logit_scale, pad, heads, *sizes)


def _check_arguments(a: Arguments) -> None:
    _check.floating("qkv", a.qkv)
    if a.qkv.ndim != 4:
        raise ValueError(f"qkv has shape {tuple(a.qkv.shape)}; expected (B, H, W, 3 * channels)")
    check_windows(a.qkv.shape[3], Windows(*a[1:]))
    _check.parameter("pad", a.pad, (a.qkv.shape[3],), "(3 * channels,)")


def check_windows(channels: int, windows: Windows) -> None:
    """Checks the arguments other than qkv and pad. channels: of queries, keys and values together."""
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
    """Returns the Triton kernels' limit of tokens per window. In float32, whose gemms run on the scalar units, it is
    one tile; larger windows are left to PyTorch's own attention."""
    return ONE_TILE if dtype == torch.float32 else 1024


def factor(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the factor of the cosines, per head."""
    return logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()


def logit_scale_gradient(d_log: Tensor, logit_scale: Tensor) -> Tensor:
    """Returns the gradient of `logit_scale` from that of its clamped value: 0 where it is clamped."""
    return torch.where(logit_scale <= MAX_LOGIT_SCALE, d_log, 0).to(logit_scale.dtype)


def _forward(p: Primitives, a: Arguments) -> Tensor:
    return p.window_attention(a.qkv, Windows(*a[1:]))


def _backward(p: Primitives, a: Arguments, _: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    gradients["qkv"], sums = p.window_attention_backward(grad, a.qkv, Windows(*a[1:]), gradients.wanted)
    gradients.sums(sums)


def request(qkv: Tensor, windows: Windows) -> Request:
    return Request((qkv.dtype,), window=(windows.window[0] * windows.window[1], qkv.shape[3] // 3 // windows.heads))


def check_indices(a: Any) -> None:
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
    indices=check_indices,
)

"""Window attention through PyTorch's compiled FlexAttention, with bias and the mask of shifted windows, to compare."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sgmim_fast.ops.window_attention import Arguments


@functools.cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def regions(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """Returns region ids, (windows of an image, tokens). Tokens of a rolled map attend only within the same region."""
    ids = torch.zeros(*grid, dtype=torch.int32, device=device)
    for axis, (size, side, by) in enumerate(zip(grid, window, shift, strict=True)):
        if by:
            at = torch.arange(size, device=device)
            part = (at >= size - side).int() + (at >= size - by).int()
            ids += part.view(-1, 1) * 3 if axis == 0 else part
    return partition(ids[None, :, :, None], window).flatten(1)


def partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """Partitions (B, H, W, C) into windows, (B * windows, tokens, C)."""
    b, height, width, c = x.shape
    x = x.view(b, height // window[0], window[0], width // window[1], window[1], c)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], c)


def window_attention(a: Arguments) -> Tensor:
    """Computes `sgmim_fast.ops.window_attention` of these arguments, for maps that divide into whole windows."""
    qkv, heads, window, shift = a.qkv, a.heads, a.window, a.shift
    b, height, width, c = *qkv.shape[:3], qkv.shape[3] // 3
    rolled = qkv.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else qkv
    q, k, v = partition(rolled, window).unflatten(-1, (3, heads, c // heads)).permute(2, 0, 3, 1, 4)
    table = a.bias if a.index is None else a.bias[a.index.flatten()].view(*a.index.shape, heads).permute(2, 0, 1)
    region = regions((height, width), window, shift, qkv.device)
    count = region.shape[0]

    def score(logit: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if table is not None:
            logit = logit + table[head, query, key]
        same = region[batch % count, query] == region[batch % count, key]
        return torch.where(same, logit, -float("inf"))

    out = compiled()(q, k, v, score_mod=score)
    down, across = height // window[0], width // window[1]
    out = out.transpose(1, 2).reshape(b, down, across, window[0], window[1], c).transpose(2, 3)
    out = out.reshape(b, height, width, c)
    return out.roll(tuple(shift), (1, 2)) if any(shift) else out

"""Primitives in plain PyTorch: the attention of `relational_guidance` and of `window_attention`."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.ops.primitives import Packed, Windows, sum_dtype
from sgmim_fast.ops.window_attention import APART, TINY, factor, logit_scale_gradient


class _Attention:
    """The packed attention on the full grid (images, heads, cells, cells + 1); the last key is the hidden cells'.

    No size depends on the data, so nothing synchronises. The kernels of the other backends stay packed.
    """

    def __init__(self, packed: Packed, width: int, dtype: torch.dtype):
        self.visible, visible_offsets, self.shown, shown_offsets, cells, heads, keep = packed
        self.images, self.cells, self.heads = visible_offsets.shape[0] - 1, cells, heads
        self.scale = (width // heads) ** -0.5
        hidden = (cells - shown_offsets.diff()).to(dtype)[:, None]
        bias = torch.full((self.images * cells,), -torch.inf, dtype=dtype, device=self.shown.device)
        bias.index_fill_(0, self.shown, 0.0)  # `bias[...] = 0.0` would copy the number to the device and synchronise
        last = hidden.log() if keep else torch.full_like(hidden, -torch.inf)
        self.bias = torch.cat([bias.view(self.images, cells), last], 1)[:, None, None]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def spread(self, x: Tensor, at: Tensor) -> Tensor:
        """Scatters packed rows (n, C) into the grid (images, heads, cells, d), zero elsewhere."""
        grid = x.new_zeros(self.images * self.cells, x.shape[1])
        grid[at] = x
        return self._split(grid.view(self.images, self.cells, -1))

    def keys(self, x: Tensor) -> Tensor:
        """(shown + 1, C) -> (images, heads, cells + 1, d), with the hidden cells' row last."""
        last = self._split(x[-1:])[None].expand(self.images, -1, -1, -1)
        return torch.cat([self.spread(x[:-1], self.shown), last], 2)

    def pack(self, grid: Tensor, at: Tensor) -> Tensor:
        """Gathers the rows `at` of the grid: (images, heads, cells, d) -> (n, C)."""
        return grid.transpose(1, 2).reshape(self.images * self.cells, -1)[at]

    def pack_keys(self, grid: Tensor) -> Tensor:
        last = grid[:, :, -1].sum(0).reshape(1, -1)
        return torch.cat([self.pack(grid[:, :, :-1], self.shown), last])

    def probabilities(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the softmax over the keys, 0 for queries without any, and the logits' logsumexp in two parts."""
        logits = q @ k.mT * self.scale + self.bias
        row_max = logits.amax(-1, keepdim=True)
        row_max = torch.where(row_max.isfinite(), row_max, 0)
        p = (logits - row_max).exp()
        row_sum = p.sum(-1, keepdim=True)
        row_sum = torch.where(row_sum > 0, row_sum, 1)
        return p / row_sum, torch.stack([row_max, row_sum.log()])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p, lse = self.probabilities(self.spread(q, self.visible), self.keys(k))
        return self.pack(p @ self.keys(v), self.visible), torch.stack([self.pack(t, self.visible) for t in lse])

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, dout = self.spread(q, self.visible), self.keys(k), self.keys(v), self.spread(dout, self.visible)
        p, _ = self.probabilities(q, k)
        dp = dout @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * self.scale
        return self.pack(ds @ k, self.visible), self.pack_keys(ds.mT @ q), self.pack_keys(p.mT @ dout)


def guidance_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    accumulator = sum_dtype(q.dtype)
    out, lse = _Attention(packed, q.shape[1], accumulator).forward(*(x.to(accumulator) for x in (q, k, v)))
    return out.to(q.dtype), lse


def guidance_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed
) -> tuple[Tensor, ...]:
    accumulator = sum_dtype(q.dtype)
    found = _Attention(packed, q.shape[1], accumulator).backward(*(x.to(accumulator) for x in (dout, q, k, v)))
    return tuple(d.to(q.dtype) for d in found)


class _Windows:
    """Partitions the grid into windows, tensors (B, down, across, heads, n, d)."""

    def __init__(self, qkv: Tensor, w: Windows):
        self.size, self.heads, self.window, self.shift, self.pad = qkv.shape[1:3], w.heads, w.window, w.shift, w.pad
        self.dtype = sum_dtype(qkv.dtype)

    def cut(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B, down, across, n, C); tokens outside the grid are `pad`, or 0."""
        (height, width), (h, w) = self.size, self.window
        x = x.to(self.dtype).roll([-s for s in self.shift], (1, 2))
        below, right = -height % h, -width % w
        x = F.pad(x, (0, 0, 0, right, 0, below))
        if pad is not None and (below or right):
            x = torch.where(self.inside(x)[..., None], x, pad.to(x.dtype))
        return x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3).flatten(3, 4)

    def inside(self, x: Tensor) -> Tensor:
        """Returns which tokens of the shifted, padded grid (B, H', W', C) lie in the grid, (H', W') bool."""
        rows, columns = (torch.arange(x.shape[i + 1], device=x.device) < self.size[i] for i in (0, 1))
        return rows[:, None] & columns

    def join(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `cut`: (B, down, across, n, C) -> (B, H, W, C), and the sum (C,) over tokens outside the grid."""
        x = x.unflatten(3, tuple(self.window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        outside = torch.where(self.inside(x)[..., None], 0, x).sum((0, 1, 2))
        return x[:, : self.size[0], : self.size[1]].roll(list(self.shift), (1, 2)), outside

    def split(self, x: Tensor) -> Tensor:
        """(..., n, heads * d) -> (..., heads, n, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(-2, -3).flatten(-2)

    def mask(self, device: torch.device) -> Tensor:
        """(down, across, 1, n, n): APART between tokens that only the shift made neighbours, else 0."""
        groups = []
        for size, window, shift in zip(self.size, self.window, self.shift, strict=True):
            whole = size + -size % window
            groups.append((torch.arange(whole, device=device) >= whole - shift).view(-1, window))
        down, across = groups
        group = (2 * down[:, None, :, None] + across[None, :, None, :]).flatten(2)
        return torch.where(group[..., None] == group[..., None, :], 0.0, APART).to(self.dtype)[:, :, None]

    def operands(self, qkv: Tensor, logit_scale: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns q, k and v, not normalised, and the factor of the queries, (heads, 1, 1) or ()."""
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
    """Returns the bias as (heads, n, n)."""
    return bias if index is None else bias[index].permute(2, 0, 1)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x / |x| and |x|."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp_min(TINY), norm


def _unit_backward(dy: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    along = torch.where(norm > TINY, (dy * y).sum(-1, keepdim=True), 0)
    return (dy - y * along) / norm.clamp_min(TINY)


def window_attention(qkv: Tensor, w: Windows) -> Tensor:
    windows = _Windows(qkv, w)
    (q, k, v), scale = windows.operands(qkv, w.logit_scale)
    if w.logit_scale is not None:
        q, k = _unit(q)[0], _unit(k)[0]
    p = windows.logits(q * scale, k, w.bias, w.index).softmax(-1)
    return windows.join(windows.merge(p @ v))[0].to(qkv.dtype, copy=True).contiguous()


def window_attention_backward(
    grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str], out: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    windows = _Windows(qkv, w)
    (q, k, v), scale = windows.operands(qkv, w.logit_scale)
    if w.logit_scale is not None:
        (q, q_norm), (k, k_norm) = _unit(q), _unit(k)
    p = windows.logits(q * scale, k, w.bias, w.index).softmax(-1)
    if out is not None:
        out.copy_(windows.join(windows.merge(p @ v))[0])
    dout = windows.split(windows.cut(grad))
    dp = dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dv = p.mT @ dout
    dq, dk = ds @ k * scale, ds.mT @ (q * scale)
    sums = {}
    if w.logit_scale is not None:
        sums["logit_scale"] = logit_scale_gradient((dq * q).sum((0, 1, 2, 4, 5)), w.logit_scale)
        dq, dk = _unit_backward(dq, q, q_norm), _unit_backward(dk, k, k_norm)
    dqkv = torch.cat([windows.merge(x) for x in (dq, dk, dv)], -1)
    if "qkv_bias" in wanted:
        sums["qkv_bias"] = dqkv.sum((0, 1, 2, 3))
    dqkv, sums["pad"] = windows.join(dqkv)
    if "bias" in wanted:
        dense = ds.sum((0, 1, 2))
        if w.index is not None:
            dense = dense.flatten(1).mT
            dense = dense.new_zeros(w.bias.shape).index_add_(0, w.index.flatten(), dense)
        sums["bias"] = dense
    return dqkv.to(qkv.dtype).contiguous(), sums

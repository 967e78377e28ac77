"""Blocks with the layout of the published code's: names of children, parameters, buffers and settings, and arguments.

They are written for these tests, from the papers. `accelerate` recognises the published blocks by this layout alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropPath(nn.Module):
    """Stochastic depth, in a class of its own as in the published code."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.empty(len(x), *[1] * (x.ndim - 1), dtype=x.dtype).bernoulli_(keep) / keep


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def window_partition(x: Tensor, side: int) -> Tensor:
    """Reshapes (B, H, W, C) to (B * windows, side^2, C)."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return x.reshape(-1, side * side, x.shape[-1])


def window_reverse(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    x = windows.view(-1, height // side, width // side, side, side, windows.shape[2])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[2])


def relative_index(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down, across = rows[:, None] - rows + height - 1, columns[:, None] - columns + width - 1
    return down * (2 * width - 1) + across


class WindowAttention(nn.Module):
    """Swin's window attention."""

    def __init__(self, dim: int, window: int, heads: int, bias: bool):
        super().__init__()
        self.dim, self.window_size, self.num_heads, self.scale = dim, (window, window), heads, (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_index(window, window))
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim, bias=bias), nn.Dropout(0.0)
        self.proj, self.proj_drop, self.softmax = nn.Linear(dim, dim), nn.Dropout(0.0), nn.Softmax(dim=-1)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return (q * self.scale) @ k.mT + bias

    def project(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.project(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = self.logits(qkv[0], qkv[1])
        if mask is not None:
            attn = (attn.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        x = self.attn_drop(self.softmax(attn)) @ qkv[2]
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class WindowAttentionV2(WindowAttention):
    """SwinV2's window attention: cosine attention, and biases computed by a small MLP."""

    def __init__(self, dim: int, window: int, heads: int, bias: bool):
        super().__init__(dim, window, heads, False)
        del self.relative_position_bias_table, self.scale
        self.logit_scale = nn.Parameter(torch.randn(heads, 1, 1) + 3)
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, heads, bias=False))
        side = torch.arange(1 - window, window).float() / max(window - 1, 1) * 8
        table = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
        self.register_buffer("relative_coords_table", (table.sign() * (table.abs() + 1).log2() / 3)[None])
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(dim)) if bias else None for _ in range(2))

    def project(self, x: Tensor) -> Tensor:
        bias = None if self.q_bias is None else torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return F.linear(x, self.qkv.weight, bias)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=torch.tensor(100.0).log().item()).exp()
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale + bias


class SwinTransformerBlock(nn.Module):
    """Swin's block, for (B, H * W, C) tokens."""

    kind_of_attention: type[nn.Module] = WindowAttention

    def __init__(
        self, dim: int, resolution: tuple[int, int], heads: int, window: int, shift: int, drop_path=0.0, bias=True
    ):
        super().__init__()
        self.dim, self.input_resolution, self.num_heads = dim, resolution, heads
        self.window_size, self.shift_size, self.mlp_ratio = window, shift, 2.0
        self.norm1, self.attn = nn.LayerNorm(dim), self.kind_of_attention(dim, window, heads, bias)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 2 * dim)
        mask = None
        if shift:
            height, width = resolution
            part = torch.zeros(1, height, width, 1)
            for i, rows in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
                for j, columns in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
                    part[:, rows, columns] = 3 * i + j
            part = window_partition(part, window).squeeze(2)
            mask = torch.where(part[:, None] == part[:, :, None], 0.0, -100.0)
        self.register_buffer("attn_mask", mask)

    def in_windows(self, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        x = x.view(len(x), height, width, -1).roll((-self.shift_size, -self.shift_size), (1, 2))
        windows = self.attn(window_partition(x, self.window_size), mask=self.attn_mask)
        x = window_reverse(windows, self.window_size, height, width)
        return x.roll((self.shift_size, self.shift_size), (1, 2)).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.in_windows(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinTransformerV2Block(SwinTransformerBlock):
    kind_of_attention = WindowAttentionV2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.norm1(self.in_windows(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PatchMerging(nn.Module):
    """Swin's patch merging, or SwinV2's with `after`."""

    def __init__(self, resolution: tuple[int, int], dim: int, after: bool = False):
        super().__init__()
        self.input_resolution, self.dim, self.after = resolution, dim, after
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if after else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        x = x.view(len(x), height, width, -1)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).flatten(1, 2)
        return self.norm(self.reduction(x)) if self.after else self.reduction(self.norm(x))


class Attention(nn.Module):
    """BEiT's and SimMIM's attention; without a window and with `plain`, MAE's."""

    def __init__(self, dim: int, heads: int, window: tuple[int, int] | None, plain: bool = False):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=plain)
        self.q_bias, self.v_bias = (None if plain else nn.Parameter(torch.randn(dim)) for _ in range(2))
        self.window_size = self.relative_position_bias_table = self.relative_position_index = None
        if window:
            self.window_size, (height, width) = window, window
            entries, tokens = (2 * height - 1) * (2 * width - 1), height * width + 1
            del self.relative_position_index
            self.relative_position_bias_table = nn.Parameter(torch.randn(entries + 3, heads))
            index = torch.full((tokens, tokens), entries)
            index[1:, 1:], index[1:, 0], index[0, 0] = relative_index(height, width), entries + 1, entries + 2
            self.register_buffer("relative_position_index", index)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = (qkv[0] * self.scale) @ qkv[1].mT
        if self.relative_position_bias_table is not None:
            attn = attn + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if rel_pos_bias is not None:
            attn = attn + rel_pos_bias
        x = self.attn_drop(attn.softmax(-1)) @ qkv[2]
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """BEiT's, SimMIM's and MAE's block."""

    def __init__(self, dim: int, heads: int, window=None, scale: float | None = None, drop_path=0.0, plain=False):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads, window, plain)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 2 * dim)
        self.gamma_1, self.gamma_2 = (None if scale is None else nn.Parameter(scale * torch.ones(dim)) for _ in "12")

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        scaled = [1 if gamma is None else gamma for gamma in (self.gamma_1, self.gamma_2)]
        x = x + self.drop_path(scaled[0] * self.attn(self.norm1(x), rel_pos_bias=rel_pos_bias))
        return x + self.drop_path(scaled[1] * self.mlp(self.norm2(x)))

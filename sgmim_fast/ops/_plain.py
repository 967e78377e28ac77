"""LayerNorm by its formulas in plain PyTorch, for the `torch` backend's hand-written backward passes."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (n, C) -> y (n, C) in x's dtype, and the statistics (2, n): mean and 1 / sqrt(var + eps)."""
    wide = x.to(wide_dtype(x))
    mean = wide.mean(-1)
    variance = (wide - mean[:, None]).square().mean(-1)
    statistics = torch.stack([mean, (variance + eps).rsqrt()])
    return apply_norm(x, statistics, weight, bias), statistics


def apply_norm(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The forward's result again, from saved statistics."""
    xhat = (x.to(statistics.dtype) - statistics[0, :, None]) * statistics[1, :, None]
    return (xhat * weight + bias).to(x.dtype)


def layer_norm_backward(dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, in the statistics' dtype."""
    mean, rstd = statistics[0, :, None], statistics[1, :, None]
    dy = dy.to(statistics.dtype)
    xhat = (x.to(statistics.dtype) - mean) * rstd
    g = dy * weight
    dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
    return dx, (dy * xhat).sum(0), dy.sum(0)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype sums and statistics are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""The primitives with PyTorch's own kernels for norms, GELU and a ViT's attention, where `_plain` has formulas. They
are timed by `sgmim_fast.tune` as "torch:library", and not chosen otherwise."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.ops import _plain, gemm, whole_attention
from sgmim_fast.ops._plain import *  # noqa: F403 - all other primitives
from sgmim_fast.ops._plain import scattered
from sgmim_fast.ops.primitives import Norm, NormGradient, NormGradients, Windows, sum_dtype


def linear_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, rows: Tensor, norm: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor, Tensor]:
    t = gemm.linear(x, weight, bias, residual=residual[rows].to(x.dtype))
    *vectors, eps = norm
    return t, *_normalised(t, *vectors, eps, t.dtype)


def dgrad_gelu(dy: Tensor, weight: Tensor, pre_activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dpre_activation = torch.ops.aten.gelu_backward(gemm.dgrad(dy, weight), pre_activation)
    return dpre_activation, F.gelu(pre_activation), dpre_activation.sum(0, dtype=sum_dtype(dpre_activation.dtype))


def layer_norms(norms: Sequence[Norm], eps: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    found = []
    for norm in norms:
        x = norm.x if norm.rows is None else norm.x[norm.rows]
        out = torch.promote_types(dtype, torch.float32) if norm.residual is not None else dtype
        y, statistics = _normalised(x, norm.weight, norm.bias, eps, out)
        found.append(((y if norm.residual is None else y + norm.residual).to(dtype), statistics))
    return found


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the norm in `dtype`, computed in float32 or wider, as under autocast on a GPU, and the statistics."""
    accumulator = sum_dtype(x.dtype)
    y, mean, rstd = torch.native_layer_norm(
        x.to(accumulator), x.shape[-1:], weight.to(accumulator), bias.to(accumulator), eps
    )
    return y.to(dtype), torch.stack([mean.flatten(), rstd.flatten()])


def layer_norms_backward(gradients: Sequence[NormGradient]) -> list[NormGradients]:
    return [_layer_norm_backward(g) for g in gradients]


def _layer_norm_backward(g: NormGradient) -> NormGradients:
    x, accumulator = g.x if g.rows is None else g.x[g.rows], g.statistics.dtype
    dy = (g.dy if g.dy2 is None else g.dy + g.dy2).to(accumulator)
    mean, rstd = g.statistics[:, :, None]
    weight, bias, x = g.weight.to(accumulator), g.bias.to(accumulator), x.to(accumulator)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], mean, rstd, weight, bias, [True] * 3
    )
    if g.residual is not None:
        dx = dx + g.residual
    return NormGradients(
        scattered(dx, g.x, g.rows) if g.rows is not None and g.need_dx else dx.to(g.dy.dtype if g.sum_dx else dx.dtype),
        torch.addcmul(bias, (x - mean) * rstd, weight).to(g.dy.dtype) if g.recompute else None,
        dweight,
        dbias,
        *([g.residual.sum(0, dtype=accumulator)] if g.sum_residual else [None]),
        *([dx.sum(0)] if g.sum_dx else [None]),
    )


def window_attention(qkv: Tensor, w: Windows) -> Tensor:
    if whole_attention.takes(qkv, w):
        return whole_attention.whole_attention(qkv, w)
    return _plain.window_attention(qkv, w)


def window_attention_backward(
    grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str], out: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]]:
    if out is not None:
        out.copy_(window_attention(qkv, w))
    if whole_attention.takes(qkv, w) and "pad" not in wanted:
        dqkv = whole_attention.whole_attention_backward(grad, qkv, w)
        return dqkv, {"qkv_bias": _plain.column_sums([dqkv.flatten(0, 2)])[0]} if "qkv_bias" in wanted else {}
    return _plain.window_attention_backward(grad, qkv, w, wanted)

"""The primitives as formulas in plain PyTorch: the `torch` backend, for any device and floating-point dtype."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.ops import _check, gemm
from sgmim_fast.ops.gather_patches import gather_patches
from sgmim_fast.ops.gemm import dgrad, linear
from sgmim_fast.ops.linear_l1 import normalized_pixels
from sgmim_fast.ops.plain_attention import (  # noqa: F401 - primitives
    guidance_attention,
    guidance_attention_backward,
    window_attention,
    window_attention_backward,
)
from sgmim_fast.ops.primitives import Gradients, Norm, NormGradient, NormGradients, Request, sum_dtype
from sgmim_fast.ops.weights import weights_in

CHECKS_INDICES = False


def takes(request: Request) -> tuple[bool, str]:
    return True, ""


def variants(request: Request) -> list[str]:
    """ "library": `ops.library`, for a call with a norm or a window."""
    return ["library"] if request.widths or request.window else []


def varied(primitives: Any, bind: Callable[[Any], Callable[..., Any]], variant: str) -> Callable[..., Any]:
    return bind(importlib.import_module(f"sgmim_fast.ops.{variant}"))  # imported lazily, as it imports this module


def batches_wgrads() -> bool:
    return False


def linears(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [linear(x, weight) for x, weight in zip(xs, weights, strict=True)]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    pre_activation = linear(x, weight, bias)
    return pre_activation, F.gelu(pre_activation)


def linear_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, rows: Tensor, norm: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor, Tensor]:
    t = linear(x, weight, bias, residual=residual[rows].to(x.dtype))
    *vectors, eps = norm
    return t, *_layer_norm(t, *vectors, eps)


def dgrads(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [dgrad(dy, weight) for dy, weight in zip(dys, weights, strict=True)]


def dgrad_gelu(dy: Tensor, weight: Tensor, pre_activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = pre_activation.to(sum_dtype(pre_activation.dtype))
    density = (-0.5 * h * h).exp() * (2 * torch.pi) ** -0.5
    dpre_activation = dgrad(dy, weight).to(h.dtype) * (torch.special.ndtr(h) + h * density)
    return dpre_activation.to(pre_activation.dtype), F.gelu(pre_activation), dpre_activation.sum(0)


def wgrads(dys: Sequence[Tensor], xs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [gemm.wgrad(dy, x) for dy, x in zip(dys, xs, strict=True)]


def layer_scale_backward(
    scale: Tensor, weight: Tensor, dweight: Tensor, bias: Tensor | None, dbias: Tensor | None
) -> Tensor:
    dscale = (dweight * weight).sum(1, dtype=sum_dtype(dweight.dtype))
    dweight.mul_(scale[:, None])
    if dbias is not None:
        dscale += dbias * bias
        dbias.mul_(scale)
    return dscale


def layer_norms(norms: Sequence[Norm], eps: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [_normalised(norm, eps, dtype) for norm in norms]


def _normalised(norm: Norm, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y, statistics = _layer_norm(_rows(norm), norm.weight, norm.bias, eps, torch.promote_types(dtype, torch.float32))
    return (y if norm.residual is None else y + norm.residual).to(dtype), statistics


def _rows(norm: Norm | NormGradient) -> Tensor:
    return norm.x if norm.rows is None else norm.x[norm.rows]


def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the norm in `dtype`, by default x's, and its statistics."""
    values = x.to(sum_dtype(x.dtype))
    mean = values.mean(-1)
    variance = (values - mean[:, None]).square().mean(-1)
    statistics = torch.stack([mean, (variance + eps).rsqrt()])
    return _apply_norm(x, statistics, weight, bias, dtype or x.dtype), statistics


def _apply_norm(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Recomputes the norm from saved statistics."""
    xhat = (x.to(statistics.dtype) - statistics[0, :, None]) * statistics[1, :, None]
    return (xhat * weight + bias).to(dtype)


def layer_norms_backward(gradients: Sequence[NormGradient]) -> list[NormGradients]:
    return [_layer_norm_backward(gradient) for gradient in gradients]


def _layer_norm_backward(g: NormGradient) -> NormGradients:
    x, mean, rstd = _rows(g), g.statistics[0, :, None], g.statistics[1, :, None]
    dy = (g.dy if g.dy2 is None else g.dy + g.dy2).to(mean.dtype)
    xhat = (x.to(mean.dtype) - mean) * rstd
    slope = dy * g.weight
    dx = (slope - slope.mean(-1, keepdim=True) - xhat * (slope * xhat).mean(-1, keepdim=True)) * rstd
    if g.residual is not None:
        dx = dx + g.residual
    return NormGradients(
        scattered(dx, g.x, g.rows) if g.rows is not None and g.need_dx else dx.to(g.dy.dtype if g.sum_dx else dx.dtype),
        _apply_norm(x, g.statistics, g.weight, g.bias, g.dy.dtype) if g.recompute else None,
        (dy * xhat).sum(0),
        dy.sum(0),
        *([g.residual.sum(0, dtype=mean.dtype)] if g.sum_residual else [None]),
        *([dx.sum(0)] if g.sum_dx else [None]),
    )


def scattered(dx: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Returns the gradient of all rows of x, given that of the rows `rows`; 0 in the others."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device).index_copy_(0, rows, dx.to(x.dtype))


def column_sums(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.sum(0, dtype=sum_dtype(x.dtype)) for x in xs]


def finish(sums: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [total.to(dtype, copy=True) for total, dtype in zip(sums, dtypes, strict=True)]


def embedded(cells: Any) -> int:
    return min(len(cells.w.merge_weights), 1)


def embed(cells: Any, weight: Tensor | None, eps: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    w = cells.w
    tokens, statistics = _layer_norm(_embedded(cells)[0], w.norm_weight, w.norm_bias, eps)
    tokens = _with_hidden(cells, tokens)
    if weight is None:
        return tokens, [], [statistics]
    vectors = w.merge_norm_weights[0], w.merge_norm_biases[0]
    y, merged = _layer_norm(tokens.view(-1, weight.shape[1]), *vectors, eps)
    return linear(y, weight), [], [statistics, merged]


def _embedded(cells: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the embedded patches, their pixels, and the weight."""
    weight, bias = weights_in(cells.dtype, cells.w.embed_weight, cells.w.embed_bias)
    pixels = cells.patches()
    return linear(pixels, weight.flatten(1), bias), pixels, weight.flatten(1)


def _with_hidden(cells: Any, tokens: Tensor) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(cells.per_cell, tokens.shape[1])])


def embed_backward(
    dx: Tensor, cells: Any, weight: Tensor | None, inputs: list[Tensor], statistics: list[Tensor], gradients: Gradients
) -> Tensor | None:
    w, (tokens, pixels, embed_weight) = cells.w, _embedded(cells)
    if weight is not None:
        normed = _with_hidden(cells, _apply_norm(tokens, statistics[0], w.norm_weight, w.norm_bias, tokens.dtype))
        vectors = w.merge_norm_weights[0], w.merge_norm_biases[0]
        dy = dgrad(dx, weight)
        merged = _layer_norm_backward(NormGradient(dy, normed.view(-1, weight.shape[1]), statistics[1], *vectors))
        gradients.weight("merge_weights[0]", dx, merged.y)
        gradients.norm("merge_norm_weights[0]", "merge_norm_biases[0]", merged)
        dx = merged.dx.to(dx.dtype).view(-1, tokens.shape[1])
    dy = dx[: tokens.shape[0]]
    norm = _layer_norm_backward(NormGradient(dy, tokens, statistics[0], w.norm_weight, w.norm_bias, sum_dx=True))
    gradients.norm("norm_weight", "norm_bias", norm)
    gradients.sums({"embed_bias": norm.dx_sum})
    gradients.weight("embed_weight", norm.dx, pixels)
    return dgrad(norm.dx, embed_weight) if "structure" in gradients else None


def place_tokens(
    tokens: Tensor, visible: Tensor, token: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float,
    rows: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    statistics = None
    if norm is not None:
        tokens, statistics = _layer_norm(tokens, *norm, eps)
    return token.to(dtype).repeat(rows, 1).index_copy_(0, visible, tokens.to(dtype)), statistics


def place_tokens_backward(
    dout: Tensor, tokens: Tensor | None, statistics: Tensor | None, visible: Tensor,
    norm: tuple[Tensor, Tensor] | None, dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    masked = torch.ones(dout.shape[0], dtype=torch.bool, device=dout.device).index_fill_(0, visible, False)
    dtokens, accumulator = dout[visible], sum_dtype(dout.dtype)
    sums = {"mask_token": dout.where(masked[:, None], 0).sum(0, dtype=accumulator)}
    if norm is not None:
        found = _layer_norm_backward(NormGradient(dtokens, tokens, statistics, *norm))
        dtokens, sums = found.dx, sums | {"norm_weight": found.weight, "norm_bias": found.bias}
    return dtokens.to(dtype), sums | {"bias": dtokens.sum(0, dtype=accumulator)}


def position_bias(a: Any) -> tuple[Tensor, Tensor]:
    share = (a.hidden()[1] @ a.fc2_weight.to(a.dtype).mT).sigmoid()
    table = a.scale * share
    return table, table * (1 - share)


def position_bias_backward(grad: Tensor, slope: Tensor, a: Any) -> tuple[Tensor, Tensor, Tensor]:
    (coordinates, hidden), dlogits = a.hidden(), grad * slope
    dhidden = (dlogits @ a.fc2_weight.to(a.dtype)).masked_fill_(hidden <= 0, 0)
    return dhidden.mT @ coordinates, dhidden.sum(0), dlogits.mT @ hidden


def linear_l1(a: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    exact = sum_dtype(a.x.dtype)
    _check.rows("rows", a.rows, a.target.shape[0] * (a.target.shape[2] // a.cell) * (a.target.shape[3] // a.cell))
    prediction = linear(operand(a, weight.dtype), weight, a.bias).to(exact)
    pixels = a.pixels(exact)
    difference = prediction - (normalized_pixels(pixels)[0] if a.normalized else pixels)
    if a.valid is not None:
        difference = torch.where(gather_patches(a.valid, a.rows, cell=a.cell, patch=a.cell), difference, 0)
    if a.squared:
        return difference.square().sum() * a.scale, difference.to(weight.dtype)
    return difference.abs().sum() * a.scale, difference.sign().to(torch.int8)


def linear_l1_backward(grad: Tensor, a: Any, weight: Tensor, differences: Tensor, gradients: Gradients) -> None:
    # The gemms take signs, exact in every dtype, and the scalar multiplies their results.
    grad, s = grad * a.factor, differences.to(weight.dtype)
    if "x" in gradients:
        dx = dgrad(s, weight).to(grad.dtype) * grad
        gradients["x"] = dx if a.packed else scattered(dx, a.x, a.rows)
    if "weight" in gradients:
        gradients["weight"] = gemm.wgrad(s, operand(a, weight.dtype)).to(grad.dtype) * grad
    gradients["bias"] = differences.sum(0, dtype=grad.dtype) * grad


def operand(a: Any, dtype: torch.dtype) -> Tensor:
    """Returns the rows of tokens that `linear_l1` multiplies, contiguous and in the dtype of the gemms."""
    return (a.x if a.packed else a.x[a.rows]).to(dtype).contiguous()

"""The primitives on the CPU: gemms (`gemm`), and the C++ kernels of csrc/cpu between them.

The kernels write into buffers that are allocated here, so that tests can fill them with NaN. Where possible, a gradient
overwrites the gradient that it is computed from.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops._plain import batches_wgrads, layer_scale_backward, operand, scattered  # noqa: F401
from sgmim_fast.ops.cpu import gemm
from sgmim_fast.ops.cpu.gemm import dgrad, dgrad_gelu, linear, linear_gelu, weights_in  # noqa: F401 - primitives
from sgmim_fast.ops.cpu.structure_embed import embed, embed_backward, embedded  # noqa: F401 - primitives
from sgmim_fast.ops.primitives import (
    Gradients,
    Norm,
    NormGradient,
    NormGradients,
    Packed,
    Request,
    Windows,
    cast,
    float32,
    storage_dtype,
    wider,
)

DTYPES = (torch.float32, torch.bfloat16)
CHECKS_INDICES = True


def takes(request: Request) -> tuple[bool, str]:
    for dtype in request.dtypes:
        if dtype not in DTYPES:
            return False, f"dtype {dtype}; the C++ kernels take float32 and bfloat16"
    if request.embedding is not None and request.embedding[2] == 0:
        return False, "an encoder stride without patch mergings; the C++ kernel joins the norms of patch and merging"
    return True, ""


def linear_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, rows: Tensor, norm: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor, Tensor]:
    t, (norm_weight, norm_bias, eps) = linear(x, weight, bias), norm
    return t, *_layer_norm(Norm(residual, norm_weight, norm_bias, rows), eps, x.dtype, add_to=t)


def linears(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [linear(x, weight) for x, weight in zip(xs, weights, strict=True)]


def dgrads(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [dgrad(dy, weight) for dy, weight in zip(dys, weights, strict=True)]


def wgrads(dys: Sequence[Tensor], xs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [gemm.wgrad(dy, x) for dy, x in zip(dys, xs, strict=True)]


def layer_norms(norms: Sequence[Norm], eps: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [_layer_norm(norm, eps, dtype) for norm in norms]


def _layer_norm(norm: Norm, eps: float, dtype: torch.dtype, add_to: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalises x[rows], or add_to + x[rows], which then overwrites `add_to`."""
    x, rows = norm.x.contiguous(), norm.rows
    count = x.shape[0] if rows is None else rows.shape[0]
    y, statistics = torch.empty(count, x.shape[1], dtype=dtype), float32(2, count)
    vectors, residual = (vector(norm.weight), vector(norm.bias)), norm.residual
    residual = None if residual is None else cast(residual, dtype).contiguous()
    torch.ops.sgmim_fast_cpu.layer_norm(x, rows, add_to, *vectors, residual, eps, y, add_to, statistics)
    return y, statistics


def layer_norms_backward(gradients: Sequence[NormGradient]) -> list[NormGradients]:
    return [_layer_norm_backward(gradient) for gradient in gradients]


def _layer_norm_backward(g: NormGradient) -> NormGradients:
    dy, residual = g.dy if g.dy2 is None else g.dy.add_(g.dy2), None
    dx = torch.empty(dy.shape, dtype=dy.dtype) if g.keep_dy else dy
    if g.residual is not None:  # a residual of a wider dtype is not rounded, and dx gets its dtype
        wide = wider(dy.dtype, g.residual.dtype)
        residual = cast(g.residual, wide).contiguous()
        dx = dx if wide == dy.dtype else torch.empty(dy.shape, dtype=wide)
    y = torch.empty(dy.shape, dtype=dy.dtype) if g.recompute else None
    sums = [float32(dy.shape[1]) if s else None for s in (True, True, g.sum_residual, g.sum_dx)]
    vectors = vector(g.weight), vector(g.bias)
    torch.ops.sgmim_fast_cpu.layer_norm_backward(
        dy, g.x.contiguous(), g.rows, g.statistics, *vectors, residual, dx, y, *sums
    )
    if g.rows is not None and g.need_dx:
        dx = scattered(dx, g.x, g.rows)
    return NormGradients(dx, y, *sums)


def vector(parameter: Tensor | None) -> Tensor | None:
    """Returns a parameter as the kernels read it, contiguous float32."""
    return None if parameter is None else cast(parameter, torch.float32).contiguous()


def finish(sums: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """A sum that is alone in its memory is not copied."""

    def finished(total: Tensor, dtype: torch.dtype) -> Tensor:
        alone = total.untyped_storage().nbytes() == total.nbytes
        return cast(total, dtype) if alone else total.to(dtype, copy=True)

    return [finished(total, dtype) for total, dtype in zip(sums, dtypes, strict=True)]


def column_sums(xs: Sequence[Tensor]) -> list[Tensor]:
    sums = [float32(x.shape[1]) for x in xs]
    for x, total in zip(xs, sums, strict=True):
        torch.ops.sgmim_fast_cpu.column_sum(x.contiguous(), total)
    return sums


def guidance_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), float32(2, q.shape[0], packed.heads)
    torch.ops.sgmim_fast_cpu.attention(q, k, v, *packed, out, lse)
    return out, lse


def guidance_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    offsets, options = (packed.visible_offsets, packed.shown_offsets), packed[4:]
    torch.ops.sgmim_fast_cpu.attention_backward(dout, q, k, v, lse, *offsets, *options, dq, dk, dv)
    return dq, dk, dv


def window_attention(qkv: Tensor, w: Windows) -> Tensor:
    out = torch.empty(*qkv.shape[:3], qkv.shape[3] // 3, dtype=qkv.dtype)
    torch.ops.sgmim_fast_cpu.window_attention(*_window_arguments(qkv, w), out)
    return out


def window_attention_backward(
    grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str], out: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    shapes = {name: t.shape for name, t in w._asdict().items() if isinstance(t, Tensor)} | {"qkv_bias": qkv.shape[3:]}
    names = "bias", "pad", "logit_scale", "qkv_bias"
    sums = {name: float32(*shapes[name]) for name in names if name in wanted}
    results = (sums.get(name) for name in names)
    arguments = _window_arguments(qkv, w)
    torch.ops.sgmim_fast_cpu.window_attention_backward(
        cast(grad, qkv.dtype).contiguous(), *arguments, dqkv, out, *results
    )
    return dqkv, sums


def _window_arguments(qkv: Tensor, w: Windows) -> tuple[Any, ...]:
    """Returns the leading arguments of both kernels."""
    index = None if w.index is None else w.index.contiguous()
    pad = None if w.pad is None else cast(w.pad, qkv.dtype).contiguous()
    return qkv.contiguous(), vector(w.bias), index, vector(w.logit_scale), pad, w.heads, *w.window, *w.shift


def position_bias(a: Any) -> tuple[Tensor, Tensor]:
    arguments = [vector(t) for t in a[:4]]
    table, slope = (float32(arguments[0].numel() // 2, a.fc2_weight.shape[0]) for _ in range(2))
    torch.ops.sgmim_fast_cpu.position_bias(*arguments, a.scale, table, slope)
    return table, slope


def position_bias_backward(grad: Tensor, slope: Tensor, a: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments, found = [vector(t) for t in a[:4]], tuple(float32(*t.shape) for t in a[1:4])
    torch.ops.sgmim_fast_cpu.position_bias_backward(grad, slope, *arguments, *found)
    return found


def place_tokens(
    tokens: Tensor, visible: Tensor, token: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float,
    rows: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out = torch.empty(rows, tokens.shape[1], dtype=dtype)
    statistics = None if norm is None else float32(2, visible.shape[0])
    vectors = (vector(t) for t in (token, *(norm or (None, None))))
    torch.ops.sgmim_fast_cpu.place_tokens(tokens, visible, *vectors, eps, out, statistics)
    return out, statistics


def place_tokens_backward(
    dout: Tensor, tokens: Tensor | None, statistics: Tensor | None, visible: Tensor,
    norm: tuple[Tensor, Tensor] | None, dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    dtokens, sums = torch.empty(visible.shape[0], dout.shape[1], dtype=dtype), float32(4, dout.shape[1])
    weight = None if norm is None else vector(norm[0])
    torch.ops.sgmim_fast_cpu.place_tokens_backward(dout, tokens, visible, weight, statistics, dtokens, sums)
    return dtokens, dict(zip(("mask_token", "norm_weight", "norm_bias", "bias"), sums, strict=True))


def linear_l1(a: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    prediction = linear(operand(a, storage_dtype(a.x, a.dtype)), weight, a.bias)
    signs = None if a.squared else torch.empty(prediction.shape, dtype=torch.int8)
    valid, total = None if a.valid is None else a.valid.contiguous(), torch.empty((), dtype=torch.float64)
    target = a.target.float()
    torch.ops.sgmim_fast_cpu.distance(
        prediction, a.rows.contiguous(), target, valid, a.cell, a.normalized, signs, total
    )
    return (total * a.scale).float(), prediction if signs is None else signs


def linear_l1_backward(grad: Tensor, a: Any, weight: Tensor, differences: Tensor, gradients: Gradients) -> None:
    scale, storage = float(grad * a.factor), storage_dtype(a.x, a.dtype)
    if a.squared:
        s, late, (sums,) = differences, scale, column_sums([differences])
    else:
        # In float32 the operand takes the scalar at no cost. In bfloat16 it would be rounded, so the results take it.
        early, late = (scale, None) if storage == torch.float32 else (1.0, scale)
        s, sums = torch.empty(differences.shape, dtype=storage), float32(differences.shape[1])
        torch.ops.sgmim_fast_cpu.expand_signs(differences, early, s, sums)
    if "x" in gradients:
        dx = dgrad(s, weight)
        dx = dx if late is None else dx.float().mul_(late)
        gradients["x"] = dx if a.packed else scattered(dx, a.x, a.rows)
    if "weight" in gradients:
        dweight = gemm.wgrad(s, operand(a, storage))
        gradients["weight"] = dweight if late is None else dweight.float().mul_(late)
    gradients["bias"] = sums.mul_(scale)

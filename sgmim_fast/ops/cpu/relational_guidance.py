"""`relational_guidance` on the CPU: library products, and csrc/cpu for everything between them.

The C++ kernels write into buffers allocated here. Nothing that the backward can recompute in one pass over a row is
kept: the three LayerNorms' results and GELU's are written again where the weight gradients need them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops import products
from sgmim_fast.ops.cpu.layer_norm import layer_norm, layer_norm_backward
from sgmim_fast.ops.cpu.linear_l1 import NATIVE
from sgmim_fast.ops.relational_guidance import (
    LINEAR,
    GuidanceParameters,
    Saved,
    collect,
    linear_weights,
    scatter,
    storage_dtype,
)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    features, dtype = args[0] if part == "forward" else args[1], args[-1]
    wanted = dtype or features.dtype
    return wanted in NATIVE, f"dtype {wanted}; the C++ kernels take float32 and bfloat16"


def forward(
    features: Tensor,
    structure: Tensor,
    parameters: list[Tensor],
    rows: list[Tensor],
    cells: int,
    heads: int,
    keep: bool,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]]:
    w = GuidanceParameters(*parameters)
    storage = storage_dtype(features, dtype)
    copies = products.copies([getattr(w, name) for name in LINEAR], storage)
    w = linear_weights(w, copies)
    features, structure = features.contiguous(), structure.contiguous()
    visible, visible_offsets, shown, shown_offsets = (r.contiguous() for r in rows)

    query, query_statistics = layer_norm(features, w.query_norm_weight, w.query_norm_bias, eps, storage, rows=visible)
    q = products.linear(query, w.q_weight)
    context, context_statistics = layer_norm(structure, w.context_norm_weight, w.context_norm_bias, eps, storage)
    k, v = products.linear(context, w.k_weight), products.linear(context, w.v_weight)
    attended = torch.empty_like(q)
    lse = torch.empty(q.shape[0], heads)
    torch.ops.sgmim_fast_cpu.attention(
        q, k, v, visible, visible_offsets, shown, shown_offsets, cells, heads, keep, attended, lse
    )
    t = products.linear(attended, w.proj_weight, w.proj_bias)
    y, out_statistics = layer_norm(features, w.out_norm_weight, w.out_norm_bias, eps, storage, rows=visible, add_to=t)
    hidden = products.linear(y, w.fc1_weight, w.fc1_bias)
    activated = torch.empty_like(hidden)
    torch.ops.sgmim_fast_cpu.gelu(hidden, activated)
    out = products.linear(activated, w.fc2_weight, w.fc2_bias).add_(t)
    saved = Saved(q, k, v, attended, lse, t, hidden, query_statistics, context_statistics, out_statistics, copies)
    return out.to(dtype or features.dtype), saved.flat()


def backward(
    grad: Tensor,
    features: Tensor,
    structure: Tensor,
    parameters: list[Tensor],
    rows: list[Tensor],
    saved: list[Tensor],
    cells: int,
    heads: int,
    keep: bool,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    s = Saved.nested(saved)
    w = linear_weights(GuidanceParameters(*parameters), s.copies)
    need = GuidanceParameters(*needs[2:])
    features, structure = features.contiguous(), structure.contiguous()
    visible, visible_offsets, _, shown_offsets = (r.contiguous() for r in rows)
    grad = grad.to(s.q.dtype).contiguous()
    kernels = torch.ops.sgmim_fast_cpu

    def weight_gradient(wanted: bool, dy: Tensor, x: Tensor) -> Tensor:
        return products.linear_weight_gradient(dy, x) if wanted else dy

    # MLP: dhidden turns in place from the gradient after GELU into the one before it
    dhidden = products.linear_input_gradient(grad, w.fc2_weight)
    activated, dfc1_bias, dfc2_bias = (
        torch.empty_like(dhidden),
        torch.empty(dhidden.shape[1]),
        torch.empty(grad.shape[1]),
    )
    kernels.gelu_backward(s.hidden, dhidden, activated, dfc1_bias)
    kernels.column_sum(grad, dfc2_bias)
    dfc2 = weight_gradient(need.fc2_weight, grad, activated)
    del activated
    dt, y, (dout_norm, dout_norm_bias, dproj_bias) = layer_norm_backward(
        products.linear_input_gradient(dhidden, w.fc1_weight),
        s.t,
        s.out_statistics,
        w.out_norm_weight,
        w.out_norm_bias,
        residual=grad,
        sum_dx=True,
    )
    dfc1 = weight_gradient(need.fc1_weight, dhidden, y)
    del dhidden, y

    # attention
    dproj = weight_gradient(need.proj_weight, dt, s.attended)
    dattended = products.linear_input_gradient(dt, w.proj_weight)
    dq, dk, dv = torch.empty_like(s.q), torch.empty_like(s.k), torch.empty_like(s.v)
    kernels.attention_backward(
        dattended, s.q, s.k, s.v, s.lse, visible_offsets, shown_offsets, cells, heads, keep, dq, dk, dv
    )
    dx, query, (dquery_norm, dquery_norm_bias) = layer_norm_backward(
        products.linear_input_gradient(dq, w.q_weight),
        features,
        s.query_statistics,
        w.query_norm_weight,
        w.query_norm_bias,
        rows=visible,
        residual=dt,
    )
    dcontext = products.linear_input_gradient(dk, w.k_weight).add_(products.linear_input_gradient(dv, w.v_weight))
    dstructure, context, (dcontext_norm, dcontext_norm_bias) = layer_norm_backward(
        dcontext, structure, s.context_statistics, w.context_norm_weight, w.context_norm_bias
    )
    return collect(
        [features, structure, *parameters],
        needs,
        [
            scatter(dx, features, visible) if needs[0] else dx,
            dstructure,
            dquery_norm,
            dquery_norm_bias,
            dcontext_norm,
            dcontext_norm_bias,
            weight_gradient(need.q_weight, dq, query),
            weight_gradient(need.k_weight, dk, context),
            weight_gradient(need.v_weight, dv, context),
            dproj,
            dproj_bias,
            dout_norm,
            dout_norm_bias,
            dfc1,
            dfc1_bias,
            dfc2,
            dfc2_bias,
        ],
    )

"""`relational_guidance` in Triton: one attention kernel each way, between products with their epilogues.

Cost in half precision: forward 8 launches (weights' copies, two norms in one, q|k|v, attention, projection, norm, two
of the MLP), backward 11 and a fill; `benchmarks/model.py` has bytes and predicted times, none is measured yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import products
from sgmim_fast.kernels.arithmetic import cast, dot
from sgmim_fast.kernels.launch import cdiv, copies_of, fits, launch, next_power_of_2, on_device, supported, tf32
from sgmim_fast.kernels.layer_norm import Norm, NormGradient, layer_norm, layer_norm_backward
from sgmim_fast.kernels.sums import Sum, finish
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.relational_guidance import LINEAR, GuidanceParameters, Saved, linear_weights, storage_dtype


@triton.jit
def _keys(shown_offsets, image, last, cells, KEEP: tl.constexpr):
    """First row of an image's shown keys, their number, and of how many hidden cells the collapsed key stands for."""
    first, count = _range(shown_offsets, image, last, cells)
    hidden = cells - count if KEEP else 0 * count
    return first, count, hidden


@triton.jit
def _range(offsets, image, rows, cells):
    """An image's first row and their number, which are those of some of the `rows` whatever the offsets are."""
    first = tl.minimum(tl.maximum(tl.load(offsets + image), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(offsets + image + 1), first), rows)
    return first, tl.minimum(end - first, cells).to(tl.int32)


@triton.jit
def _rows(x, row, here, width, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head's part of rows, (rows, BLOCK_D), zero elsewhere."""
    d = tl.arange(0, BLOCK_D)
    at = row[:, None] * width + head * D + d[None, :]
    return tl.load(x + at, mask=here[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _logits(q, k, j, count, hidden, scale, PRECISION: tl.constexpr):
    """(queries, keys); the key after the last shown one counts as often as there are hidden cells."""
    s = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32), PRECISION) * scale
    s += tl.where(j == count, tl.log(tl.maximum(hidden, 1).to(tl.float32)), 0.0)[None, :]
    there = (j < count) | ((j == count) & (hidden > 0))
    return tl.where(there[None, :], s, float("-inf"))


@triton.jit
def _relational_guidance_forward_kernel(
    q, k, v, out, lse, visible_offsets, shown_offsets, visible, last, cells, heads, width, scale,
    KEEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, image = tl.program_id(1), tl.program_id(2)
    begin, queries = _range(visible_offsets, image, visible, cells)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < queries:
        first, count, hidden = _keys(shown_offsets, image, last, cells, KEEP)
        row = begin + i
        query = _rows(q, row, i < queries, width, head, D, BLOCK_D)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, count + 1, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            key_row = tl.where(j < count, first + j, last)
            key = _rows(k, key_row, j <= count, width, head, D, BLOCK_D)
            value = _rows(v, key_row, j <= count, width, head, D, BLOCK_D)
            s = _logits(query, key, j, count, hidden, scale, PRECISION)
            higher = tl.maximum(top, tl.max(s, 1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far
            p = tl.exp(s - finite[:, None])
            shrink = tl.exp(top - finite)
            norm = norm * shrink + tl.sum(p, 1)
            total = dot(cast(p, value.dtype), value, total * shrink[:, None], PRECISION)
            top = higher
        some = norm > 0
        total /= tl.where(some, norm, 1.0)[:, None]
        d = tl.arange(0, BLOCK_D)
        at = row[:, None] * width + head * D + d[None, :]
        tl.store(out + at, cast(total, out.dtype.element_ty), mask=(i < queries)[:, None] & (d < D)[None, :])
        total_log = tl.where(some, top + tl.log(tl.where(some, norm, 1.0)), 0.0)
        tl.store(lse + row * heads + head, total_log, mask=i < queries)


@triton.jit
def _relational_guidance_backward_kernel(
    dout, q, k, v, out, lse, visible_offsets, shown_offsets, dq, dk, dv, hidden_sums,
    visible, last, cells, heads, width, scale, key_blocks,
    KEEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs below `key_blocks` sum over queries for dk and dv, the others over keys for dq; no sum is shared."""
    block, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, queries = _range(visible_offsets, image, visible, cells)
    first, count, hidden = _keys(shown_offsets, image, last, cells, KEEP)
    single = count + (hidden > 0).to(tl.int32) == 1  # its weight is 1 whatever the logit, without a rounding
    d = tl.arange(0, BLOCK_D)
    if block < key_blocks:
        j = block * BLOCK_N + tl.arange(0, BLOCK_N)
        if block * BLOCK_N <= count:
            key_row = tl.where(j < count, first + j, last)
            key = _rows(k, key_row, j <= count, width, head, D, BLOCK_D)
            value = _rows(v, key_row, j <= count, width, head, D, BLOCK_D)
            dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for start in range(0, queries, BLOCK_M):
                i = start + tl.arange(0, BLOCK_M)
                row = begin + i
                query = _rows(q, row, i < queries, width, head, D, BLOCK_D)
                grad = _rows(dout, row, i < queries, width, head, D, BLOCK_D)
                attended = _rows(out, row, i < queries, width, head, D, BLOCK_D)
                delta = tl.sum(grad.to(tl.float32) * attended.to(tl.float32), 1)
                norm = tl.load(lse + row * heads + head, mask=i < queries, other=0.0)
                p = tl.exp(_logits(query, key, j, count, hidden, scale, PRECISION) - norm[:, None])
                dp = dot(grad, tl.trans(value), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
                ds = tl.where(single, 0.0, p * (dp - delta[:, None]) * scale)
                dvalue = dot(tl.trans(cast(p, grad.dtype)), grad, dvalue, PRECISION)
                dkey = dot(tl.trans(cast(ds, query.dtype)), query, dkey, PRECISION)
            at = key_row[:, None] * width + head * D + d[None, :]
            inside = (j < count)[:, None] & (d < D)[None, :]
            tl.store(dk + at, cast(dkey, dk.dtype.element_ty), mask=inside)
            tl.store(dv + at, cast(dvalue, dv.dtype.element_ty), mask=inside)
            at = image.to(tl.int64) * width + head * D + d[None, :] + 0 * j[:, None]
            inside = (j == count)[:, None] & (d < D)[None, :]
            tl.store(hidden_sums + at, dkey, mask=inside)
            tl.store(hidden_sums + tl.num_programs(2).to(tl.int64) * width + at, dvalue, mask=inside)
    else:
        i = (block - key_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        if (block - key_blocks) * BLOCK_M < queries:
            row = begin + i
            query = _rows(q, row, i < queries, width, head, D, BLOCK_D)
            grad = _rows(dout, row, i < queries, width, head, D, BLOCK_D)
            attended = _rows(out, row, i < queries, width, head, D, BLOCK_D)
            delta = tl.sum(grad.to(tl.float32) * attended.to(tl.float32), 1)
            norm = tl.load(lse + row * heads + head, mask=i < queries, other=0.0)
            dquery = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for start in range(0, count + 1, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                key_row = tl.where(j < count, first + j, last)
                key = _rows(k, key_row, j <= count, width, head, D, BLOCK_D)
                value = _rows(v, key_row, j <= count, width, head, D, BLOCK_D)
                p = tl.exp(_logits(query, key, j, count, hidden, scale, PRECISION) - norm[:, None])
                dp = dot(grad, tl.trans(value), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
                ds = tl.where(single, 0.0, p * (dp - delta[:, None]) * scale)
                dquery = dot(cast(ds, key.dtype), key, dquery, PRECISION)
            at = row[:, None] * width + head * D + d[None, :]
            tl.store(dq + at, cast(dquery, dq.dtype.element_ty), mask=(i < queries)[:, None] & (d < D)[None, :])


def _options(q: Tensor, heads: int, cells: int, keep: bool, backward: bool) -> dict[str, Any]:
    """Blocks as small as the grid of cells allows: Swin's 36 cells need no more than 32 queries at a time.

    The backward holds five tiles of a head's width: in half precision eight warps keep them in registers; float32
    products on the scalar units want whole rows of operands besides, and the backward spills even at 16 queries.
    """
    half, d = q.dtype != torch.float32, q.shape[1] // heads
    most = 64 if half else 16 if backward else 32
    block = min(64 if cells > 48 else 32 if cells > 16 else 16, most)
    return {
        "KEEP": keep,
        "D": d,
        "BLOCK_D": max(next_power_of_2(d), 16),
        "BLOCK_M": min(block, 32),
        "BLOCK_N": block,
        "PRECISION": tf32(),
        "num_warps": 8 if backward or not half else 4,
        "num_stages": 2,
    }


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible_offsets: Tensor, shown_offsets: Tensor, cells: int, heads: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """Attention of each image's visible rows over its shown keys and, with `keep`, the last key for all hidden cells.

    q: (visible, C), k and v: (shown + 1, C). Returns the result (visible, C) and the log-sums (visible, heads).
    Cost: reads q, and k and v once per block of 32 queries; 1 launch.
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[0], heads, dtype=torch.float32, device=q.device)
    width, images = q.shape[1], visible_offsets.shape[0] - 1
    options = _options(q, heads, cells, keep, False)
    launch(
        _relational_guidance_forward_kernel,
        (cdiv(cells, options["BLOCK_M"]), heads, images),
        q,
        k,
        v,
        out,
        lse,
        visible_offsets,
        shown_offsets,
        q.shape[0],
        k.shape[0] - 1,
        cells,
        heads,
        width,
        (width // heads) ** -0.5,
        **options,
    )
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible_offsets: Tensor,
    shown_offsets: Tensor,
    cells: int,
    heads: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. The last key's are summed over the images in a fixed order.

    Cost: reads q, dout and out once per block of keys, k and v once per block of queries; 2 launches.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    width, images = q.shape[1], visible_offsets.shape[0] - 1
    hidden_sums = torch.empty(2, images, width, dtype=torch.float32, device=q.device)
    options = _options(q, heads, cells, keep, True)
    key_blocks = cdiv(cells + 1, options["BLOCK_N"])
    launch(
        _relational_guidance_backward_kernel,
        (key_blocks + cdiv(cells, options["BLOCK_M"]), heads, images),
        dout,
        q,
        k,
        v,
        out,
        lse,
        visible_offsets,
        shown_offsets,
        dq,
        dk,
        dv,
        hidden_sums,
        q.shape[0],
        k.shape[0] - 1,
        cells,
        heads,
        width,
        (width // heads) ** -0.5,
        key_blocks,
        **options,
    )
    finish([Sum(hidden_sums[0], dk[-1]), Sum(hidden_sums[1], dv[-1])])
    return dq, dk, dv


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    features, _, parameters = args[:3] if part == "forward" else args[1:4]
    dtype = args[-1]
    usable, reason = supported(dtype or features.dtype)
    return fits(features.shape[1], parameters[11].shape[0]) if usable else (usable, reason)


def _contiguous(w: GuidanceParameters) -> GuidanceParameters:
    return GuidanceParameters(*(t.contiguous() for t in w))


@on_device
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
    attend: Callable[..., tuple[Tensor, Tensor]] = attention,
) -> tuple[Tensor, list[Tensor]]:
    w = GuidanceParameters(*parameters)
    storage = storage_dtype(features, dtype)
    copies = copies_of([getattr(w, name) for name in LINEAR], storage)
    w = _contiguous(linear_weights(w, copies))
    features, structure = features.contiguous(), structure.contiguous()
    visible, visible_offsets, _, shown_offsets = (r.contiguous() for r in rows)

    query = torch.empty(visible.shape[0], features.shape[1], dtype=storage, device=features.device)
    context = torch.empty(structure.shape, dtype=storage, device=features.device)
    query_statistics, context_statistics = layer_norm(
        [
            Norm(features, w.query_norm_weight, w.query_norm_bias, query, rows=visible),
            Norm(structure, w.context_norm_weight, w.context_norm_bias, context),
        ],
        eps,
    )
    q, k, v = products.linears([query, context, context], [w.q_weight, w.k_weight, w.v_weight])
    attended, lse = attend(q, k, v, visible_offsets, shown_offsets, cells, heads, keep)
    t = products.linear(attended, w.proj_weight, w.proj_bias, residual=features, rows=visible)
    y = torch.empty_like(t)
    (out_statistics,) = layer_norm([Norm(t, w.out_norm_weight, w.out_norm_bias, y)], eps)
    hidden, activated = products.linear_gelu(y, w.fc1_weight, w.fc1_bias)
    out = products.linear(activated, w.fc2_weight, w.fc2_bias, residual=t)
    saved = Saved(q, k, v, attended, lse, t, hidden, query_statistics, context_statistics, out_statistics, copies)
    return out.to(dtype or features.dtype), saved.flat()


@on_device
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
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = attention_backward,
) -> list[Tensor]:
    original, s, need = GuidanceParameters(*parameters), Saved.nested(saved), GuidanceParameters(*needs[2:])
    w = _contiguous(linear_weights(original, s.copies))
    features, structure = features.contiguous(), structure.contiguous()
    visible, visible_offsets, _, shown_offsets = (r.contiguous() for r in rows)
    grad = grad.to(s.q.dtype).contiguous()

    # MLP
    biases = {name: torch.empty_like(getattr(w, name)) for name in ("proj_bias", "fc1_bias", "fc2_bias")}
    dhidden, activated, fc1_sum = products.input_gradient_gelu(grad, w.fc2_weight, s.hidden, biases["fc1_bias"])
    (dy,) = products.input_gradients([dhidden], [w.fc1_weight])
    dt = torch.empty_like(s.t)
    out_norm = NormGradient(
        dy,
        s.t,
        s.out_statistics,
        w.out_norm_weight,
        w.out_norm_bias,
        dt,
        residual=grad,
        biases=(biases["fc2_bias"], biases["proj_bias"]),
    )
    (y,), (out_sums,) = layer_norm_backward([out_norm])
    # attention
    (dattended,) = products.input_gradients([dt], [w.proj_weight])
    dq, dk, dv = attend_backward(
        dattended, s.q, s.k, s.v, s.attended, s.lse, visible_offsets, shown_offsets, cells, heads, keep
    )
    dquery, dkey, dvalue = products.input_gradients([dq, dk, dv], [w.q_weight, w.k_weight, w.v_weight])
    dfeatures, dstructure = torch.zeros_like(features), torch.empty_like(structure)
    query_norm = NormGradient(
        dquery,
        features,
        s.query_statistics,
        w.query_norm_weight,
        w.query_norm_bias,
        dfeatures,
        rows=visible,
        residual=dt,
    )
    context_norm = NormGradient(
        dkey, structure, s.context_statistics, w.context_norm_weight, w.context_norm_bias, dstructure, more=dvalue
    )
    (query, context), (query_sums, context_sums) = layer_norm_backward([query_norm, context_norm])
    # parameters
    pairs = {
        "q_weight": (dq, query),
        "k_weight": (dk, context),
        "v_weight": (dv, context),
        "proj_weight": (dt, s.attended),
        "fc1_weight": (dhidden, y),
        "fc2_weight": (grad, activated),
    }
    pairs = {name: pair for name, pair in pairs.items() if getattr(need, name)}
    found: dict[str, Tensor] = {}
    if pairs:
        dtypes = [getattr(original, name).dtype for name in pairs]
        dys, xs = (list(tensors) for tensors in zip(*pairs.values(), strict=True))
        found = dict(zip(pairs, products.weight_gradients(dys, xs, dtypes), strict=True))
    finish([*out_sums, *query_sums, *context_sums, fc1_sum])
    norms = {"out_norm": out_sums, "query_norm": query_sums, "context_norm": context_sums}
    for name, (gain, shift, *_) in norms.items():
        found |= {f"{name}_weight": gain.out, f"{name}_bias": shift.out}
    found |= biases
    grads = [dfeatures, dstructure, *(found.get(name) for name in w._fields)]
    return [
        grad if wanted else absent(t)
        for t, grad, wanted in zip([features, structure, *parameters], grads, needs, strict=True)
    ]

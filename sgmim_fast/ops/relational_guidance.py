"""`relational_guidance`: the guidance block's cross-attention and MLP on visible cells. SPEC "Relational guidance"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.primitives import (
    Gradients,
    Norm,
    NormGradient,
    Packed,
    Primitives,
    Request,
    storage_dtype,
    sum_dtype,
)
from sgmim_fast.rows import Rows


class GuidanceParameters(NamedTuple):
    """Weights of the guidance block of width C; linear weights are (out, in)."""

    query_norm_weight: Tensor  # (C,)
    query_norm_bias: Tensor  # (C,)
    context_norm_weight: Tensor  # (C,)
    context_norm_bias: Tensor  # (C,)
    q_weight: Tensor  # (C, C)
    k_weight: Tensor  # (C, C)
    v_weight: Tensor  # (C, C)
    proj_weight: Tensor  # (C, C)
    proj_bias: Tensor  # (C,)
    out_norm_weight: Tensor  # (C,)
    out_norm_bias: Tensor  # (C,)
    fc1_weight: Tensor  # (hidden, C)
    fc1_bias: Tensor  # (hidden,)
    fc2_weight: Tensor  # (C, hidden)
    fc2_bias: Tensor  # (C,)


class Saved(NamedTuple):
    """The tensors that the forward saves for the backward, which recomputes everything else."""

    q: Tensor  # (visible, C)
    k: Tensor  # (shown + 1, C)
    v: Tensor  # (shown + 1, C)
    attended: Tensor  # (visible, C) result of the attention
    lse: Tensor  # (2, visible, heads) logsumexp of the logits in two parts: the largest logit, and the rest
    t: Tensor  # (visible, C) attention branch plus residual
    pre_activation: Tensor  # (visible, hidden)
    query_statistics: Tensor  # (2, visible) mean and 1 / standard deviation
    context_statistics: Tensor  # (2, shown + 1)
    out_statistics: Tensor  # (2, visible)


LINEAR = ("q_weight", "k_weight", "v_weight", "proj_weight", "fc1_weight", "fc2_weight")
ROWS = ("visible.index", "visible.offsets", "shown.index", "shown.offsets")


class RowLists(NamedTuple):
    """The fields of two `Rows`."""

    visible: Tensor
    visible_offsets: Tensor
    shown: Tensor
    shown_offsets: Tensor

    @classmethod
    def names(cls, _: int) -> Sequence[str]:
        return ROWS


class Arguments(NamedTuple):
    """The operator's arguments, see `relational_guidance`."""

    features: Tensor
    structure: Tensor
    parameters: GuidanceParameters
    rows: RowLists
    cells: int
    heads: int
    keep_hidden: bool
    visible_only: bool
    eps: float
    dtype: torch.dtype | None

    @property
    def packed(self) -> Packed:
        return Packed(*(r.contiguous() for r in self.rows), self.cells, self.heads, self.keep_hidden)

    @property
    def wanted(self) -> Tensor | None:
        """Indices of the rows of `features` to read; None: all rows."""
        return None if self.visible_only else self.rows.visible.contiguous()


def relational_guidance(
    features: Tensor,
    structure: Tensor,
    visible: Rows,
    shown: Rows,
    parameters: GuidanceParameters,
    *,
    heads: int = 8,
    hidden_context: str = "keep",
    eps: float = 1e-5,
    cells: int | None = None,
) -> Tensor:
    """Guides the visible cells by the shown structure cells and one collapsed key for all hidden cells.

    Plain PyTorch, per image: `q = features[visible]`, `kv = cat([structure[shown], h, ..., h])` with one h per hidden
    cell, `t = q + proj(attention(norm(q), norm(kv)))`, result `t + mlp(norm(t))`; see the forward of
    `sgmim_fast.guidance.RelationalGuidance`.

    Args:
        features: (B * N, C), encoder tokens of the batch, row-major.
        structure: (shown cells + 1, C), a row per shown cell in the order of `shown`, then the hidden cells' row h.
        visible: `Rows` of `features` to guide, with the offsets of each image.
        shown: `Rows` of the cells of `structure`.
        parameters: weights of the block.
        heads: number of attention heads, a divisor of C. The scale is (C / heads)^-0.5.
        hidden_context: "keep": the hidden cells take part in the attention, with token h; "drop": they do not. The
            attention then returns 0 for an image without any key.
        eps: eps of the three LayerNorms.
        cells: None, or N if `features` are packed, (visible cells, C), row i belonging to cell visible.index[i].

    Returns:
        (visible cells, C), one guided token per visible cell, in autocast's dtype, or that of `features`.
        Differentiable in `features`, `structure` and the parameters.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    if hidden_context not in ("keep", "drop"):
        raise ValueError(f"hidden_context is {hidden_context!r}; expected 'keep' or 'drop'")
    rows = [visible.index, visible.offsets, shown.index, shown.offsets]
    visible_only, keep = cells is not None, hidden_context == "keep"
    if cells is None:
        cells = features.shape[0] // max(visible.offsets.numel() - 1, 1) if features.ndim else 0
    return _op(features, structure, list(parameters), rows, cells, heads, keep, visible_only, eps, None)[0]


def _check_arguments(a: Arguments) -> None:
    for name, list_of_rows in zip(ROWS, a.rows, strict=True):
        _check.index(name, list_of_rows)
    features, w = a.features, a.parameters
    _check.shape("q_weight", w.q_weight, (None, None), "(width, width)")
    _check.parameter("features", features, (None, w.q_weight.shape[1]), "(cells of the batch, width)")
    count, width = features.shape
    _check.parameter("structure", a.structure, (a.rows.shown.shape[0] + 1, width), "(shown cells + 1, width)")
    images = a.rows.visible_offsets.shape[0] - 1
    _check.shape("shown.offsets", a.rows.shown_offsets, (images + 1,), "(images + 1,), as visible.offsets")
    if a.visible_only:
        _check.shape("features", features, (a.rows.visible.shape[0], width), "(visible cells, width)")
        if images < 1 or a.cells < 1:
            raise ValueError(f"cells is {a.cells}, of {images} images; expected at least 1 of each")
    elif images < 1 or count != images * a.cells:
        raise ValueError(f"features has {count} rows for {images} images; expected the same number for each image")
    if a.heads < 1 or width % a.heads:
        raise ValueError(f"heads is {a.heads}; expected a divisor of the width {width}")
    _check.shape("fc1_weight", w.fc1_weight, (None, width), "(hidden, width of features)")
    hidden = w.fc1_weight.shape[0]
    vector, square = ((width,), "(width of features,)"), ((width, width), "(width of features, the same)")
    others = {
        "fc1_weight": ((hidden, width), "(hidden, width of features)"),
        "fc1_bias": ((hidden,), "(hidden,)"),
        "fc2_weight": ((width, hidden), "(width of features, hidden)"),
    }
    for name, tensor in zip(w._fields, w, strict=True):
        _check.parameter(name, tensor, *(others.get(name) or (square if name in LINEAR else vector)))
    for name in LINEAR:
        _check.same_dtype("features", features, name, getattr(w, name), a.dtype)
    _check.same_dtype("features", features, "structure", a.structure, a.dtype)


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    w, storage, packed = a.parameters, storage_dtype(a.features, a.dtype), a.packed
    wq, wk, wv, wproj, w1, w2, bproj, b1, b2 = p.weights_in(
        storage, *(getattr(w, name) for name in LINEAR), w.proj_bias, w.fc1_bias, w.fc2_bias
    )
    norms = [
        Norm(a.features, w.query_norm_weight, w.query_norm_bias, a.wanted),
        Norm(a.structure, w.context_norm_weight, w.context_norm_bias),
    ]
    (query, query_statistics), (context, context_statistics) = p.layer_norms(norms, a.eps, storage)
    q, k, v = p.linears([query, context, context], [wq, wk, wv])
    attended, lse = p.guidance_attention(q, k, v, packed)
    norm = w.out_norm_weight, w.out_norm_bias, a.eps
    rows = torch.arange(len(a.features), device=a.features.device) if a.wanted is None else a.wanted
    t, y, out_statistics = p.linear_norm(attended, wproj, bproj, a.features, rows, norm)
    pre_activation, activated = p.linear_gelu(y, w1, b1)
    out = p.linear(activated, w2, b2, residual=t, dtype=a.dtype or a.features.dtype)
    saved = Saved(q, k, v, attended, lse, t, pre_activation, query_statistics, context_statistics, out_statistics)
    return out, list(saved)


def _backward(p: Primitives, a: Arguments, saved: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    w, s, packed = a.parameters, Saved(*saved), a.packed
    wq, wk, wv, wproj, w1, w2 = p.weights_in(s.q.dtype, *(getattr(w, name) for name in LINEAR), last=True)
    grad = grad.to(s.q.dtype).contiguous()
    # MLP branch
    dpre_activation, activated, fc1_bias = p.dgrad_gelu(grad, w2, s.pre_activation)
    gradients.weight("fc2_weight", grad, activated)
    del activated
    dy = p.dgrad(dpre_activation, w1)
    norm = NormGradient(dy, s.t, s.out_statistics, w.out_norm_weight, w.out_norm_bias, residual=grad)
    (out,) = p.layer_norms_backward([norm._replace(sum_residual=True, sum_dx=True)])
    gradients.weight("fc1_weight", dpre_activation, out.y)
    gradients.norm("out_norm_weight", "out_norm_bias", out)
    gradients.sums({"fc1_bias": fc1_bias, "fc2_bias": out.residual, "proj_bias": out.dx_sum})
    dt = out.dx
    del dpre_activation, out, norm, dy
    # attention branch
    gradients.weight("proj_weight", dt, s.attended)
    dattended = p.dgrad(dt, wproj)
    dq, dk, dv = p.guidance_attention_backward(dattended, s.q, s.k, s.v, s.attended, s.lse, packed)
    del dattended
    dquery, dkey, dvalue = p.dgrads([dq, dk, dv], [wq, wk, wv])
    vectors = w.query_norm_weight, w.query_norm_bias
    of_query = NormGradient(dquery, a.features, s.query_statistics, *vectors, a.wanted, residual=dt)
    of_query = of_query._replace(need_dx="features" in gradients)
    vectors = w.context_norm_weight, w.context_norm_bias
    of_context = NormGradient(dkey, a.structure, s.context_statistics, *vectors, dy2=dvalue)
    query, context = p.layer_norms_backward([of_query, of_context])
    gradients["features"], gradients["structure"] = query.dx, context.dx
    gradients.norm("query_norm_weight", "query_norm_bias", query)
    gradients.norm("context_norm_weight", "context_norm_bias", context)
    for name, dy, y in (("q_weight", dq, query.y), ("k_weight", dk, context.y), ("v_weight", dv, context.y)):
        gradients.weight(name, dy, y)


def _fake(a: Arguments) -> tuple[Tensor, list[Tensor]]:
    storage, accumulator = storage_dtype(a.features, a.dtype), sum_dtype(a.features.dtype)
    visible, shown, width = a.rows.visible.shape[0], a.structure.shape[0], a.features.shape[1]

    def empty(*shape: int, dtype: torch.dtype = storage) -> Tensor:
        return a.features.new_empty(shape, dtype=dtype)

    saved = Saved(
        q=empty(visible, width),
        k=empty(shown, width),
        v=empty(shown, width),
        attended=empty(visible, width),
        lse=empty(2, visible, a.heads, dtype=accumulator),
        t=empty(visible, width),
        pre_activation=empty(visible, a.parameters.fc1_weight.shape[0]),
        query_statistics=empty(2, visible, dtype=accumulator),
        context_statistics=empty(2, shown, dtype=accumulator),
        out_statistics=empty(2, visible, dtype=accumulator),
    )
    return empty(visible, width, dtype=a.dtype or a.features.dtype), list(saved)


def _check_indices(a: Arguments) -> None:
    _check.image_rows("visible", *a.rows[:2], a.cells)
    _check.image_rows("shown", *a.rows[2:], a.cells)


_op = Op(
    "relational_guidance",
    Arguments,
    _forward,
    backward=_backward,
    fake=_fake,
    check=_check_arguments,
    request=lambda a: Request(
        (a.features.dtype, a.structure.dtype, a.dtype or a.features.dtype),
        (a.features.shape[1], a.parameters.fc1_weight.shape[0]),
    ),
    indices=_check_indices,
    saves=True,
)

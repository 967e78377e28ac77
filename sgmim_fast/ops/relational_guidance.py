"""`relational_guidance`: cross-attention and MLP of the guidance on the visible cells. SPEC "Relational guidance"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.ops import _check, products
from sgmim_fast.ops._op import Op, absent
from sgmim_fast.ops._plain import apply_norm, layer_norm, layer_norm_backward, wide_dtype
from sgmim_fast.rows import Rows


class GuidanceParameters(NamedTuple):
    """Weights of the guidance block, width C; linear weights are (out, in)."""

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
    """What the forward keeps for the backward; everything else is recomputed."""

    q: Tensor  # (visible, C)
    k: Tensor  # (shown + 1, C)
    v: Tensor  # (shown + 1, C)
    attended: Tensor  # (visible, C) attention's result
    lse: Tensor  # (visible, heads) log of the attention's normaliser
    t: Tensor  # (visible, C) after the attention's residual
    hidden: Tensor  # (visible, hidden) before GELU
    query_statistics: Tensor  # (2, visible) mean and 1 / standard deviation
    context_statistics: Tensor  # (2, shown + 1)
    out_statistics: Tensor  # (2, visible)
    copies: list[Tensor]  # of the linear weights in the dtype of the products, where that is another

    def flat(self) -> list[Tensor]:
        return [*self[:-1], *self.copies]

    @classmethod
    def nested(cls, flat: list[Tensor]) -> Saved:
        k = len(cls._fields) - 1
        return cls(*flat[:k], list(flat[k:]))


LINEAR = ("q_weight", "k_weight", "v_weight", "proj_weight", "fc1_weight", "fc2_weight")


def linear_weights(w: GuidanceParameters, copies: list[Tensor]) -> GuidanceParameters:
    """The parameters with the copies in place of the linear weights, where there are any."""
    return w._replace(**dict(zip(LINEAR, copies, strict=True))) if copies else w


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
) -> Tensor:
    """Guidance of the visible cells by the shown structure cells and one collapsed key for all hidden ones.

    Plain PyTorch, per image: `q = features[visible]`, `kv = cat([structure[shown], h, ..., h])` with one h per hidden
    cell, `t = q + proj(attention(norm(q), norm(kv)))`, result `t + mlp(norm(t))`; see the forward of
    `sgmim_fast.guidance.RelationalGuidance`.

    Args:
        features: (B * N, C) encoder tokens of the whole batch, row-major.
        structure: (shown cells + 1, C): a row per shown cell in the order of `shown`, then the hidden cells' row h.
        visible: rows of `features` to guide, and where each image's begin (see `Rows`).
        shown: the cells of the `structure` rows, likewise.
        parameters: weights of the block.
        heads: attention heads; divide C. The scale is (C / heads)^-0.5.
        hidden_context: "keep": the hidden cells take part in the attention, as h; "drop": they don't. An image that has
            no key at all then gets 0 from the attention.
        eps: of the three LayerNorms.

    Returns:
        (visible cells, C): one guided token per visible cell; the autocast dtype, or that of `features`. Differentiable
        in `features`, `structure` and the parameters.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
    """
    if hidden_context not in ("keep", "drop"):
        raise ValueError(f"hidden_context is {hidden_context!r}; expected 'keep' or 'drop'")
    rows = [visible.index, visible.offsets, shown.index, shown.offsets]
    cells = features.shape[0] // max(visible.offsets.numel() - 1, 1) if features.ndim else 0
    keep = hidden_context == "keep"
    return _op(features, structure, list(parameters), rows, cells, heads, keep, eps, None)[0]


ROWS = ("visible.index", "visible.offsets", "shown.index", "shown.offsets")


def _check_arguments(
    features: Tensor,
    structure: Tensor,
    parameters: list[Tensor],
    rows: list[Tensor],
    cells: int,
    heads: int,
    keep: bool,
    eps: float,
    dtype: torch.dtype | None,
) -> None:
    if len(parameters) != len(GuidanceParameters._fields) or len(rows) != len(ROWS):
        raise ValueError(
            f"parameters and rows have {len(parameters)} and {len(rows)} tensors; expected "
            f"{len(GuidanceParameters._fields)} and {len(ROWS)}"
        )
    for name, list_of_rows in zip(ROWS, rows, strict=True):
        _check.index(name, list_of_rows)
    w = GuidanceParameters(*parameters)
    _check.shape("q_weight", w.q_weight, (None, None), "(width, width)")
    _check.parameter("features", features, (None, w.q_weight.shape[1]), "(cells of the batch, width)")
    count, width = features.shape
    _check.parameter("structure", structure, (rows[2].shape[0] + 1, width), "(shown cells + 1, width)")
    images = rows[1].shape[0] - 1
    _check.shape("shown.offsets", rows[3], (images + 1,), "(images + 1,), as visible.offsets")
    if images < 1 or count != images * cells:
        raise ValueError(f"features has {count} rows for {images} images; expected as many for each image")
    if heads < 1 or width % heads:
        raise ValueError(f"heads is {heads}; expected a divisor of the width {width}")
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
        _check.same_dtype("features", features, name, getattr(w, name), dtype)
    _check.same_dtype("features", features, "structure", structure, dtype)


def storage_dtype(features: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What products are done in and activations saved in."""
    return products.compute_dtype(dtype or features.dtype, features.device)


class _Attention:
    """The packed attention on the full grid of cells: (images, heads, cells, cells + 1), shown keys and the hidden one.

    No size depends on the data, so nothing waits for the device; the kernels of the other backends stay packed.
    """

    def __init__(self, rows: list[Tensor], cells: int, heads: int, keep: bool, width: int, dtype: torch.dtype):
        self.visible, self.visible_offsets, self.shown, shown_offsets = rows
        self.images, self.cells, self.heads = self.visible_offsets.shape[0] - 1, cells, heads
        self.scale = (width // heads) ** -0.5
        hidden = (cells - shown_offsets.diff()).to(dtype)[:, None]
        bias = torch.full((self.images * cells,), -torch.inf, dtype=dtype, device=self.shown.device)
        bias.index_fill_(0, self.shown, 0.0)  # `bias[...] = 0.0` would copy the number to the device, and wait
        last = hidden.log() if keep else torch.full_like(hidden, -torch.inf)
        self.bias = torch.cat([bias.view(self.images, cells), last], 1)[:, None, None]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def spread(self, x: Tensor, at: Tensor) -> Tensor:
        """Packed rows (n, C) onto the grid (images, heads, cells, d), zero elsewhere."""
        grid = x.new_zeros(self.images * self.cells, x.shape[1])
        grid[at] = x
        return self._split(grid.view(self.images, self.cells, -1))

    def keys(self, x: Tensor) -> Tensor:
        """(shown + 1, C) -> (images, heads, cells + 1, d), the hidden cells' row last."""
        last = self._split(x[-1:])[None].expand(self.images, -1, -1, -1)
        return torch.cat([self.spread(x[:-1], self.shown), last], 2)

    def pack(self, grid: Tensor, at: Tensor) -> Tensor:
        """(images, heads, cells, d) -> the rows `at`, (n, C)."""
        return grid.transpose(1, 2).reshape(self.images * self.cells, -1)[at]

    def pack_keys(self, grid: Tensor) -> Tensor:
        last = grid[:, :, -1].sum(0).reshape(1, -1)
        return torch.cat([self.pack(grid[:, :, :-1], self.shown), last])

    def probabilities(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the keys, 0 where there is none, and its log-sum."""
        logits = q @ k.mT * self.scale + self.bias
        lse = logits.logsumexp(-1, keepdim=True)
        lse = torch.where(lse.isfinite(), lse, 0)
        return (logits - lse).exp(), lse

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p, lse = self.probabilities(self.spread(q, self.visible), self.keys(k))
        return self.pack(p @ self.keys(v), self.visible), self.pack(lse, self.visible)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, dout = self.spread(q, self.visible), self.keys(k), self.keys(v), self.spread(dout, self.visible)
        p, _ = self.probabilities(q, k)
        dp = dout @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * self.scale
        return self.pack(ds @ k, self.visible), self.pack_keys(ds.mT @ q), self.pack_keys(p.mT @ dout)


def _forward(
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
    _check.image_rows("visible", *rows[:2], cells)
    _check.image_rows("shown", *rows[2:], cells)
    w = GuidanceParameters(*parameters)
    storage = storage_dtype(features, dtype)
    copies = products.copies([getattr(w, name) for name in LINEAR], storage)
    w = linear_weights(w, copies)
    x, context = features[rows[0]].to(storage), structure.to(storage)
    query, query_statistics = layer_norm(x, w.query_norm_weight, w.query_norm_bias, eps)
    context, context_statistics = layer_norm(context, w.context_norm_weight, w.context_norm_bias, eps)
    q, k, v = (
        products.linear(y, weight) for y, weight in ((query, w.q_weight), (context, w.k_weight), (context, w.v_weight))
    )
    wide = wide_dtype(x)
    attention = _Attention(rows, cells, heads, keep, features.shape[1], wide)
    attended, lse = attention.forward(q.to(wide), k.to(wide), v.to(wide))
    attended = attended.to(storage)
    t = x + products.linear(attended, w.proj_weight, w.proj_bias)
    y, out_statistics = layer_norm(t, w.out_norm_weight, w.out_norm_bias, eps)
    hidden = products.linear(y, w.fc1_weight, w.fc1_bias)
    out = t + products.linear(F.gelu(hidden), w.fc2_weight, w.fc2_bias)
    saved = Saved(q, k, v, attended, lse, t, hidden, query_statistics, context_statistics, out_statistics, copies)
    return out.to(dtype or features.dtype, copy=True), saved.flat()


def _backward(
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
    storage, wide = s.q.dtype, s.out_statistics.dtype
    grad = grad.to(storage)
    x, context = features[rows[0]].to(storage), structure.to(storage)
    y = apply_norm(s.t, s.out_statistics, w.out_norm_weight, w.out_norm_bias)

    activated = F.gelu(s.hidden)
    dfc2 = products.linear_weight_gradient(grad, activated)
    dhidden = products.linear_input_gradient(grad, w.fc2_weight).to(wide)
    h = s.hidden.to(wide)
    density = (-0.5 * h * h).exp() * (2 * torch.pi) ** -0.5
    dhidden = dhidden * (torch.special.ndtr(h) + h * density)
    dfc1_bias, dhidden = dhidden.sum(0), dhidden.to(storage)
    dfc1 = products.linear_weight_gradient(dhidden, y)
    dt, dout_norm, dout_norm_bias = layer_norm_backward(
        products.linear_input_gradient(dhidden, w.fc1_weight), s.t, s.out_statistics, w.out_norm_weight
    )
    dt = dt + grad
    dproj_bias, dt = dt.sum(0), dt.to(storage)
    dproj = products.linear_weight_gradient(dt, s.attended)
    dattended = products.linear_input_gradient(dt, w.proj_weight)
    attention = _Attention(rows, cells, heads, keep, features.shape[1], wide)
    dq, dk, dv = (
        d.to(storage) for d in attention.backward(dattended.to(wide), s.q.to(wide), s.k.to(wide), s.v.to(wide))
    )
    query = apply_norm(x, s.query_statistics, w.query_norm_weight, w.query_norm_bias)
    normed = apply_norm(context, s.context_statistics, w.context_norm_weight, w.context_norm_bias)
    dquery = products.linear_input_gradient(dq, w.q_weight)
    dx, dquery_norm, dquery_norm_bias = layer_norm_backward(dquery, x, s.query_statistics, w.query_norm_weight)
    dnormed = products.linear_input_gradient(dk, w.k_weight) + products.linear_input_gradient(dv, w.v_weight)
    dstructure, dcontext_norm, dcontext_norm_bias = layer_norm_backward(
        dnormed, context, s.context_statistics, w.context_norm_weight
    )
    return collect(
        [features, structure, *parameters],
        needs,
        [
            scatter(dx + dt, features, rows[0]),
            dstructure,
            dquery_norm,
            dquery_norm_bias,
            dcontext_norm,
            dcontext_norm_bias,
            products.linear_weight_gradient(dq, query),
            products.linear_weight_gradient(dk, normed),
            products.linear_weight_gradient(dv, normed),
            dproj,
            dproj_bias,
            dout_norm,
            dout_norm_bias,
            dfc1,
            dfc1_bias,
            dfc2,
            grad.sum(0, dtype=wide),
        ],
    )


def scatter(dx: Tensor, features: Tensor, visible: Tensor) -> Tensor:
    """The visible rows' gradient as the gradient of all features."""
    return torch.zeros(features.shape, dtype=features.dtype, device=features.device).index_copy_(
        0, visible, dx.to(features.dtype)
    )


def collect(inputs: list[Tensor], needs: list[bool], grads: list[Tensor]) -> list[Tensor]:
    """Each wanted gradient in its input's dtype, and an empty tensor for every other."""
    return [
        # vectors may be rows of one tensor of sums; results of an op must not share memory
        grad.to(t.dtype, copy=grad.ndim == 1).contiguous() if need else absent(t)
        for t, need, grad in zip(inputs, needs, grads, strict=True)
    ]


def _fake(features, structure, parameters, rows, cells, heads, keep, eps, dtype):
    w = GuidanceParameters(*parameters)
    storage, wide = storage_dtype(features, dtype), wide_dtype(features)
    visible, shown, width = rows[0].shape[0], structure.shape[0], features.shape[1]

    def empty(*shape, dtype=storage):
        return features.new_empty(shape, dtype=dtype)

    saved = Saved(
        q=empty(visible, width),
        k=empty(shown, width),
        v=empty(shown, width),
        attended=empty(visible, width),
        lse=empty(visible, heads, dtype=wide),
        t=empty(visible, width),
        hidden=empty(visible, w.fc1_weight.shape[0]),
        query_statistics=empty(2, visible, dtype=wide),
        context_statistics=empty(2, shown, dtype=wide),
        out_statistics=empty(2, visible, dtype=wide),
        copies=products.fake_copies([getattr(w, name) for name in LINEAR], storage),
    )
    return empty(visible, width, dtype=dtype or features.dtype), saved.flat()


_op = Op(
    "relational_guidance",
    "(Tensor features, Tensor structure, Tensor[] parameters, Tensor[] rows, SymInt cells, SymInt heads, "
    "bool keep_hidden, float eps, ScalarType? dtype) -> (Tensor, Tensor[])",
    forward=_forward,
    fake=_fake,
    check=_check_arguments,
    fields={"parameters": lambda _: GuidanceParameters._fields, "rows": lambda _: ROWS},
)


def _save(ctx: Any, inputs: tuple, results: tuple) -> None:
    features, structure, parameters, rows, *ctx.options, _, ctx.dtype = inputs
    ctx.save_for_backward(features, structure, *parameters, *rows, *results[1])


def _gradients(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    features, structure, *rest = ctx.saved_tensors
    count = len(GuidanceParameters._fields)
    parameters, rows, saved = rest[:count], rest[count : count + 4], rest[count + 4 :]
    flags = [needs[0], needs[1], *needs[2]]
    grads = _op.backward(grad, features, structure, parameters, rows, saved, *ctx.options, flags, ctx.dtype)
    return grads[0], grads[1], grads[2:]


def _fake_backward(grad, features, structure, parameters, rows, saved, cells, heads, keep, needs, dtype):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else absent(t)
        for t, need in zip([features, structure, *parameters], needs, strict=True)
    ]


_op.differentiable(
    "(Tensor grad, Tensor features, Tensor structure, Tensor[] parameters, Tensor[] rows, Tensor[] saved, "
    "SymInt cells, SymInt heads, bool keep_hidden, bool[] needs, ScalarType? dtype) -> Tensor[]",
    backward=_backward,
    fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)

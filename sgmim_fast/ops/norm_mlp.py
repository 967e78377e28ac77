"""`norm_mlp`: LayerNorm and the two-layer MLP with GELU that reads it, or the MLP alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.ops import _check, products
from sgmim_fast.ops._op import Op, absent
from sgmim_fast.ops._plain import layer_norm, layer_norm_backward, wide_dtype
from sgmim_fast.ops.norm_linear import check_norm, check_rows, normalized, result_dtype, storage_dtype


def norm_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: bool = False,
) -> Tensor:
    """`F.linear(F.gelu(F.linear(F.layer_norm(x, ...), fc1...)), fc2...)`; of it all, only GELU's input is kept.

    Args:
        x: (..., C), floating point.
        fc1_weight, fc1_bias: (hidden, C), (hidden,).
        fc2_weight, fc2_bias: (O, hidden), (O,).
        norm_weight, norm_bias: (C,) of the LayerNorm; both None: no LayerNorm.
        eps: of the LayerNorm.
        residual: whether x itself is added to the result, O = C; its gradient is then added in the norm's backward.

    Returns:
        (..., O); the autocast dtype, or that of `x`, with `residual` the wider one. Differentiable in every tensor.
        GELU is the exact one.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
    """
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., channels)")
    rows = x.flatten(0, -2)
    out = _op(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, residual, eps, None)[0]
    return out.unflatten(0, x.shape[:-1])


def _check_arguments(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: bool,
    eps: float,
    dtype: torch.dtype | None,
) -> None:
    check_rows(x)
    _check.parameter("fc1_weight", fc1_weight, (None, x.shape[-1]), "(hidden, channels of x)")
    hidden = fc1_weight.shape[0]
    _check.parameter("fc1_bias", fc1_bias, (hidden,), "(hidden,)")
    _check.parameter("fc2_weight", fc2_weight, (None, hidden), "(out, hidden)")
    _check.parameter("fc2_bias", fc2_bias, fc2_weight.shape[:1], "(out,)")
    if residual:
        _check.shape("fc2_weight", fc2_weight, (x.shape[-1], hidden), "(channels of x, which is added, hidden)")
    check_norm(x, norm_weight, norm_bias)
    _check.same_dtype("x", x, "fc1_weight", fc1_weight, dtype)
    _check.same_dtype("x", x, "fc2_weight", fc2_weight, dtype)


def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: bool,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    y, statistics = x.to(storage_dtype(x, dtype)), absent(x)
    if norm_weight is not None:
        y, statistics = layer_norm(y, norm_weight, norm_bias, eps)
    hidden = products.linear(y, fc1_weight, fc1_bias)
    added = x if residual else None
    out = products.linear(F.gelu(hidden), fc2_weight, fc2_bias, added)
    return out.to(result_dtype(x, added, dtype)), hidden, statistics


def _backward(
    grad: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    hidden: Tensor,
    statistics: Tensor,
    residual: bool,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    added, grad, wide = grad, grad.to(hidden.dtype), wide_dtype(hidden)
    dfc2 = products.linear_weight_gradient(grad, F.gelu(hidden)) if needs[3] else grad
    h = hidden.to(wide)
    density = (-0.5 * h * h).exp() * (2 * torch.pi) ** -0.5
    dhidden = products.linear_input_gradient(grad, fc2_weight).to(wide) * (torch.special.ndtr(h) + h * density)
    dfc1_bias, dhidden = dhidden.sum(0), dhidden.to(hidden.dtype)
    y = normalized(x, statistics, norm_weight, norm_bias, hidden.dtype)
    dfc1 = products.linear_weight_gradient(dhidden, y) if needs[1] else grad
    dx = dnorm_weight = dnorm_bias = products.linear_input_gradient(dhidden, fc1_weight)
    if norm_weight is not None:
        dx, dnorm_weight, dnorm_bias = layer_norm_backward(dx, x.to(hidden.dtype), statistics, norm_weight)
    if residual:
        dx = dx + added
    grads = [dx, dfc1, dfc1_bias, dfc2, grad.sum(0, dtype=wide), dnorm_weight, dnorm_bias]
    return collect(x, fc1_weight, needs, grads, norm_weight)


def collect(
    x: Tensor, fc1_weight: Tensor, needs: list[bool], grads: list[Tensor], norm_weight: Tensor | None
) -> list[Tensor]:
    """Each wanted gradient in its input's dtype: of x, the four of the layers and the norm's two."""
    norm = x if norm_weight is None else norm_weight
    return [
        grad.to(like.dtype, copy=grad.ndim == 1).contiguous() if need else absent(like)
        for like, need, grad in zip((x, *[fc1_weight] * 4, norm, norm), needs, grads, strict=True)
    ]


def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, residual, eps, dtype):
    rows = x.shape[0]
    statistics = absent(x) if norm_weight is None else x.new_empty(2, rows, dtype=wide_dtype(x))
    hidden = x.new_empty(rows, fc1_weight.shape[0], dtype=storage_dtype(x, dtype))
    out = x.new_empty(rows, fc2_weight.shape[0], dtype=result_dtype(x, x if residual else None, dtype))
    return out, hidden, statistics


_op = Op(
    "norm_mlp",
    "(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor? norm_weight, "
    "Tensor? norm_bias, bool residual, float eps, ScalarType? dtype) -> (Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    check=_check_arguments,
)


def _save(ctx: Any, inputs: tuple, results: tuple) -> None:
    x, fc1_weight, fc1_bias, fc2_weight, _, norm_weight, norm_bias, ctx.residual, _, ctx.dtype = inputs
    # the backward does without fc1_bias, but `hidden` has it in it
    ctx.save_for_backward(x, fc1_weight, fc2_weight, norm_weight, norm_bias, *results[1:], fc1_bias)


def _gradients(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    return tuple(_op.backward(grad, *ctx.saved_tensors[:-1], ctx.residual, list(needs[:7]), ctx.dtype))


def _fake_backward(grad, x, fc1_weight, fc2_weight, norm_weight, norm_bias, hidden, statistics, residual, needs, dtype):
    norm = x if norm_weight is None else norm_weight
    layers = [shape for weight in (fc1_weight, fc2_weight) for shape in (weight.shape, weight.shape[:1])]
    shapes = [(x, x.shape), *((fc1_weight, shape) for shape in layers), *[(norm, x.shape[1:])] * 2]
    return [like.new_empty(shape) if need else absent(like) for (like, shape), need in zip(shapes, needs, strict=True)]


_op.differentiable(
    "(Tensor grad, Tensor x, Tensor fc1_weight, Tensor fc2_weight, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor hidden, Tensor statistics, bool residual, bool[] needs, ScalarType? dtype) -> Tensor[]",
    backward=_backward,
    fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)

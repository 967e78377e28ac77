"""`norm_linear`: LayerNorm and the linear layer that reads it, or the linear layer alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops import _check, products
from sgmim_fast.ops._op import Op, absent
from sgmim_fast.ops._plain import apply_norm, layer_norm, layer_norm_backward, wide_dtype


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """`F.linear(F.layer_norm(x, ...), weight, bias) + residual`; the norm's result is not kept but computed again.

    Args:
        x: (..., C), floating point.
        weight: (O, C).
        bias: (O,) or None.
        norm_weight, norm_bias: (C,) of the LayerNorm; both None: no LayerNorm.
        eps: of the LayerNorm.
        residual: (..., O), floating point, or None: nothing is added.

    Returns:
        (..., O); the autocast dtype, or that of `x`, and at least that of `residual`. Differentiable in every tensor.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
    """
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., channels)")
    if residual is not None and weight.ndim == 2:
        _check.parameter("residual", residual, (*x.shape[:-1], weight.shape[0]), "(those of x, out)")
        residual = residual.flatten(0, -2)
    out, _ = _op(x.flatten(0, -2), weight, bias, norm_weight, norm_bias, residual, eps, None)
    return out.unflatten(0, x.shape[:-1])


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> None:
    check_rows(x)
    _check.parameter("weight", weight, (None, x.shape[1]), "(out, channels of x)")
    _check.parameter("bias", bias, (weight.shape[0],), "(out,)")
    check_norm(x, norm_weight, norm_bias)
    _check.parameter("residual", residual, (x.shape[0], weight.shape[0]), "(rows of x, out)")
    _check.same_dtype("x", x, "weight", weight, dtype)


def check_rows(x: Tensor) -> None:
    _check.parameter("x", x, (None, None), "(rows, channels)")


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if (weight is None) != (bias is None):
        raise ValueError("norm_weight and norm_bias: expected both or neither")
    for name, vector in (("norm_weight", weight), ("norm_bias", bias)):
        _check.parameter(name, vector, (x.shape[-1],), "(channels of x,)")


def storage_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What products are done in."""
    return products.compute_dtype(dtype or x.dtype, x.device)


def result_dtype(x: Tensor, residual: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    """As of the sum in PyTorch."""
    wanted = dtype or x.dtype
    return wanted if residual is None else torch.promote_types(wanted, residual.dtype)


def normalized(x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the product reads, again."""
    return (x if weight is None else apply_norm(x.to(dtype), statistics, weight, bias)).to(dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    y, statistics = x.to(storage_dtype(x, dtype)), absent(x)
    if norm_weight is not None:
        y, statistics = layer_norm(y, norm_weight, norm_bias, eps)
    return products.linear(y, weight, bias, residual).to(result_dtype(x, residual, dtype)), statistics


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    grad = grad.to(storage_dtype(x, dtype))
    dx = products.linear_input_gradient(grad, weight)
    y = normalized(x, statistics, norm_weight, norm_bias, grad.dtype)
    dnorm_weight = dnorm_bias = dx
    if norm_weight is not None:
        dx, dnorm_weight, dnorm_bias = layer_norm_backward(dx, x.to(grad.dtype), statistics, norm_weight)
    dweight = products.linear_weight_gradient(grad, y) if needs[1] else grad
    dbias = grad.sum(0, dtype=wide_dtype(grad))
    return collect(x, weight, needs, [dx, dweight, dbias, dnorm_weight, dnorm_bias], norm_weight)


def collect(
    x: Tensor, weight: Tensor, needs: list[bool], grads: list[Tensor], norm_weight: Tensor | None
) -> list[Tensor]:
    """Each wanted gradient in its input's dtype: of x, weight, bias and the norm's two."""
    norm = x if norm_weight is None else norm_weight
    return [
        grad.to(like.dtype, copy=grad.ndim == 1).contiguous() if need else absent(like)
        for like, need, grad in zip((x, weight, weight, norm, norm), needs, grads, strict=True)
    ]


def _fake(x, weight, bias, norm_weight, norm_bias, residual, eps, dtype):
    wide = wide_dtype(x)
    statistics = absent(x) if norm_weight is None else x.new_empty(2, x.shape[0], dtype=wide)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=result_dtype(x, residual, dtype)), statistics


_op = Op(
    "norm_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, float eps, "
    "ScalarType? dtype) -> (Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    check=_check_arguments,
)


def _save(ctx: Any, inputs: tuple, results: tuple) -> None:
    x, weight, _, norm_weight, norm_bias, residual, _, ctx.dtype = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, results[1])


def _gradients(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    grads = _op.backward(grad, *ctx.saved_tensors, list(needs[:5]), ctx.dtype)
    return *grads, None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)


def _fake_backward(grad, x, weight, norm_weight, norm_bias, statistics, needs, dtype):
    norm = x if norm_weight is None else norm_weight
    shapes = ((x, x.shape), (weight, weight.shape), (weight, weight.shape[:1]), *[(norm, x.shape[1:])] * 2)
    return [like.new_empty(shape) if need else absent(like) for (like, shape), need in zip(shapes, needs, strict=True)]


_op.differentiable(
    "(Tensor grad, Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor statistics, bool[] needs, "
    "ScalarType? dtype) -> Tensor[]",
    backward=_backward,
    fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)

"""`norm_linear`: a linear layer, with an optional LayerNorm before it, layer scale and residual."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.primitives import (
    Gradients,
    Primitives,
    Request,
    cast,
    normalized,
    normalized_backward,
    result_dtype,
    rows_of,
    scaled_weight,
    storage_dtype,
    sum_dtype,
    unflattened,
)


class Arguments(NamedTuple):
    """The operator's arguments, see `norm_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    layer_scale: Tensor | None
    residual: Tensor | None
    eps: float
    dtype: torch.dtype | None


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`F.linear(F.layer_norm(x, ...), weight, bias) * layer_scale + residual`.

    The norm's result is not saved; the backward recomputes it.

    Args:
        x: (..., C), floating point.
        weight: (O, C).
        bias: (O,) or None.
        norm_weight, norm_bias: (C,), parameters of the LayerNorm; None, both: no LayerNorm.
        eps: eps of the LayerNorm.
        layer_scale: (O,), multiplies the result before the residual is added; not with float16.
        residual: (..., O), floating point, added to the result; None: nothing is added.

    Returns:
        (..., O) in autocast's dtype, or that of `x`, promoted with the dtypes of `layer_scale` and `residual`.
        Differentiable in every tensor.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    return _op(x, weight, bias, norm_weight, norm_bias, layer_scale, residual, eps, None)[0]


def _check_arguments(a: Arguments) -> None:
    check_norm(a)
    _check.parameter("weight", a.weight, (None, a.x.shape[-1]), "(out, channels of x)")
    _check.parameter("bias", a.bias, (a.weight.shape[0],), "(out,)")
    _check.parameter("residual", a.residual, (*a.x.shape[:-1], a.weight.shape[0]), "(those of x, out)")
    check_layer_scale(a, a.weight.shape[0], "(out,)")
    _check.same_dtype("x", a.x, "weight", a.weight, a.dtype)


def check_norm(a: Any) -> None:
    """Checks x and the optional norm's parameters."""
    _check.floating("x", a.x)
    if a.x.ndim < 2:
        raise ValueError(f"x has shape {tuple(a.x.shape)}; expected (..., channels)")
    if (a.norm_weight is None) != (a.norm_bias is None):
        raise ValueError("norm_weight and norm_bias: expected both or neither")
    for name in ("norm_weight", "norm_bias"):
        _check.parameter(name, getattr(a, name), (a.x.shape[-1],), "(channels of x,)")


def check_layer_scale(a: Any, width: int, meaning: str) -> None:
    """Checks the optional layer scale of an op whose result has `width` channels."""
    if a.layer_scale is None:
        return
    _check.parameter("layer_scale", a.layer_scale, (width,), meaning)
    if getattr(a, "post_norm", False):
        raise ValueError("layer_scale and post_norm: expected one of them; a norm undoes a scale before it")
    if a.layer_scale.dtype == torch.float64 != a.x.dtype:
        raise TypeError(f"layer_scale has dtype torch.float64; expected at most torch.float32, as x is {a.x.dtype}")
    if (a.dtype or a.x.dtype) == torch.float16:
        raise TypeError(
            "layer_scale with float16, which cannot hold a small scale times a weight; expected another dtype, or the "
            "result multiplied afterwards"
        )


def fake_norm(a: Any) -> list[Tensor]:
    """Returns fakes of the tensors saved for the norm, if any: its statistics, and its input if it is a post-norm."""
    if a.norm_weight is None:
        return []
    rows = math.prod(a.x.shape[:-1])
    statistics = a.x.new_empty(2, rows, dtype=sum_dtype(a.x.dtype))
    if not getattr(a, "post_norm", False):
        return [statistics]
    return [statistics, a.x.new_empty(rows, a.x.shape[-1], dtype=storage_dtype(a.x, a.dtype))]


def request(a: Any) -> Request:
    return Request((a.x.dtype, a.dtype or a.x.dtype), (a.x.shape[-1],))


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    storage = storage_dtype(a.x, a.dtype)
    y, statistics = normalized(p, rows_of(a.x), a.norm_weight, a.norm_bias, a.eps, storage)
    weight, bias = p.weights_in(storage, a.weight, a.bias)
    residual = None if a.residual is None else rows_of(a.residual)
    dtype = result_dtype(a.x, residual, a.dtype, a.layer_scale)
    out = p.linear(y, weight, bias, scale=a.layer_scale, residual=residual, dtype=dtype)
    return unflattened(out, a.x), statistics


def _backward(p: Primitives, a: Arguments, statistics: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    storage, dy = storage_dtype(a.x, a.dtype), None
    grad, x = cast(rows_of(grad), storage).contiguous(), rows_of(a.x)
    gradients.scaled(a.layer_scale, "weight", a.weight, "bias", a.bias)
    if "bias" in gradients:
        gradients.sums({"bias": p.column_sums([grad])[0]})
    if "x" in gradients or a.norm_weight is not None:
        dy = p.dgrad(grad, scaled_weight(p, a.layer_scale, storage, a.weight))
    y = normalized_backward(p, dy, x, statistics, a, gradients, storage, recompute="weight" in gradients)
    gradients.weight("weight", grad, y)


def _fake(a: Arguments) -> tuple[Tensor, list[Tensor]]:
    dtype = result_dtype(a.x, a.residual, a.dtype, a.layer_scale)
    return a.x.new_empty(*a.x.shape[:-1], a.weight.shape[0], dtype=dtype), fake_norm(a)


_op = Op(
    "norm_linear",
    Arguments,
    _forward,
    backward=_backward,
    fake=_fake,
    check=_check_arguments,
    request=request,
    saves=True,
    added="residual",
)

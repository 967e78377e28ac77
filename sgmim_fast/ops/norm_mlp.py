"""`norm_mlp`: a two-layer MLP with GELU, with an optional LayerNorm, layer scale and residual."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.norm_linear import check_layer_scale, check_norm, fake_norm, request
from sgmim_fast.ops.primitives import (
    Gradients,
    Primitives,
    half_input,
    half_input_backward,
    half_output,
    half_output_backward,
    result_dtype,
    rows_of,
    scaled_weight,
    storage_dtype,
    unflattened,
)


class Arguments(NamedTuple):
    """The operator's arguments, see `norm_mlp`."""

    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    layer_scale: Tensor | None
    residual: bool
    post_norm: bool
    eps: float
    dtype: torch.dtype | None


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
    layer_scale: Tensor | None = None,
    residual: bool = False,
    post_norm: bool = False,
) -> Tensor:
    """`F.linear(F.gelu(F.linear(F.layer_norm(x, ...), fc1...)), fc2...)`; of the MLP only the pre-activation is saved.

    Args:
        x: (..., C), floating point.
        fc1_weight, fc1_bias: (hidden, C), (hidden,).
        fc2_weight, fc2_bias: (O, hidden), (O,).
        norm_weight, norm_bias: (C,), parameters of the LayerNorm; None, both: no LayerNorm.
        eps: eps of the LayerNorm.
        layer_scale: (C,), multiplies the result before x is added; needs O = C, not with float16 nor `post_norm`.
        residual: whether to add x to the result; needs O = C. The norm's backward then adds its gradient.
        post_norm: whether the norm follows the second layer instead of preceding the first, as in SwinV2; needs O = C.

    Returns:
        (..., O) in autocast's dtype, or that of `x`; with `residual` or `layer_scale` promoted with their dtypes.
        Differentiable in every tensor. GELU is exact (erf).

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    layers, vectors = (fc1_weight, fc1_bias, fc2_weight, fc2_bias), (norm_weight, norm_bias, layer_scale)
    return _op(x, *layers, *vectors, residual, post_norm, eps, None)[0]


def _check_arguments(a: Arguments) -> None:
    check_norm(a)
    width = a.x.shape[-1]
    _check.parameter("fc1_weight", a.fc1_weight, (None, width), "(hidden, channels of x)")
    hidden = a.fc1_weight.shape[0]
    _check.parameter("fc1_bias", a.fc1_bias, (hidden,), "(hidden,)")
    _check.parameter("fc2_weight", a.fc2_weight, (None, hidden), "(out, hidden)")
    _check.parameter("fc2_bias", a.fc2_bias, a.fc2_weight.shape[:1], "(out,)")
    if a.residual:
        _check.shape("fc2_weight", a.fc2_weight, (width, hidden), "(channels of x, which is added, hidden)")
    check_layer_scale(a, width, "(channels of x,)")
    if a.layer_scale is not None:
        _check.shape("fc2_weight", a.fc2_weight, (width, hidden), "(channels of x, as layer_scale has, hidden)")
    if a.post_norm:
        _check.shape("fc2_weight", a.fc2_weight, (width, hidden), "(channels of the norm behind it, hidden)")
    _check.same_dtype("x", a.x, "fc1_weight", a.fc1_weight, a.dtype)
    _check.same_dtype("x", a.x, "fc2_weight", a.fc2_weight, a.dtype)


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    storage, rows = storage_dtype(a.x, a.dtype), rows_of(a.x)
    y, statistics = half_input(p, a, rows, storage)
    w1, b1, w2, b2 = p.weights_in(storage, a.fc1_weight, a.fc1_bias, a.fc2_weight, a.fc2_bias)
    pre_activation, activated = p.linear_gelu(y, w1, b1)
    out, norm = half_output(p, a, rows, activated, w2, b2)
    return unflattened(out, a.x), [pre_activation, *statistics, *norm]


def _backward(p: Primitives, a: Arguments, saved: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    pre_activation, *norm = saved
    gradients.scaled(a.layer_scale, "fc2_weight", a.fc2_weight, "fc2_bias", a.fc2_bias)
    grad, added = half_output_backward(p, a, norm, rows_of(grad), pre_activation.dtype, "fc2_bias", gradients)
    (w1,) = p.weights_in(pre_activation.dtype, a.fc1_weight, last=True)
    w2 = scaled_weight(p, a.layer_scale, pre_activation.dtype, a.fc2_weight)
    dpre_activation, activated, fc1_bias = p.dgrad_gelu(grad, w2, pre_activation)
    gradients.sums({"fc1_bias": fc1_bias})
    gradients.weight("fc2_weight", grad, activated)
    del activated  # one of the largest tensors here
    rows, names = rows_of(a.x), ("fc1_weight", "fc2_bias")
    y = half_input_backward(p, a, norm, rows, dpre_activation, w1, added, *names, gradients, pre_activation.dtype)
    gradients.weight("fc1_weight", dpre_activation, y)


def _fake(a: Arguments) -> tuple[Tensor, list[Tensor]]:
    pre_activation = a.x.new_empty(math.prod(a.x.shape[:-1]), a.fc1_weight.shape[0], dtype=storage_dtype(a.x, a.dtype))
    dtype = result_dtype(a.x, a.x if a.residual else None, a.dtype, a.layer_scale)
    return a.x.new_empty(*a.x.shape[:-1], a.fc2_weight.shape[0], dtype=dtype), [pre_activation, *fake_norm(a)]


_op = Op(
    "norm_mlp",
    Arguments,
    _forward,
    backward=_backward,
    fake=_fake,
    check=_check_arguments,
    request=request,
    saves=True,
)

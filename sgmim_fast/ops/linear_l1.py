"""`linear_l1`: a linear head and the summed L1 distance to the pixels it predicts. SPEC "Heads and losses"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.gather_patches import gather_patches_backward
from sgmim_fast.ops.primitives import Gradients, Primitives, Request, storage_dtype, sum_dtype
from sgmim_fast.ops.weights import weights_in


class Arguments(NamedTuple):
    """Of the op, as of `linear_l1`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    valid: Tensor | None
    rows: Tensor
    cell: int
    packed: bool
    scale: float
    dtype: torch.dtype | None


def linear_l1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    rows: Tensor,
    *,
    cell: int,
    packed: bool = True,
    valid: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Scaled sum of |x . weight^T + bias - pixels| over the wanted cells; no prediction is kept, only its signs.

    Plain PyTorch:
    `(F.linear(x, weight, bias) - gather_patches(target, rows, cell=cell, patch=cell)).abs().sum() * scale`.

    Args:
        x: tokens, floating point. packed=True: (n, C), the i-th belongs to cell rows[i]. packed=False: (cells, C), one
            token per cell of the whole batch, of which `rows` are read.
        weight: (S * cell^2, C); output channel c * cell^2 + i * cell + j is pixel (i, j) of channel c.
        bias: (S * cell^2,).
        target: (B, S, H, W), any strides; H and W multiples of `cell`. Used in float32 (float64 with float64 tokens).
        rows: (n,) int64, distinct indices into the B * (H / cell) * (W / cell) cells, row-major.
        cell: side of a cell in pixels.
        packed: see `x`.
        valid: (B, S, H, W) bool, True where the target counts; None: everywhere.
        scale: what the sum is multiplied by, 1 / count for a mean.

    Returns:
        The sum, a scalar, float32 (float64 with float64 tokens). Differentiable in `x`, `weight`, `bias` and `target`;
        the gradient of |0| is 0, as in PyTorch.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
    """
    return _op(x, weight, bias, target, valid, rows, cell, packed, scale, None)[0]


def _check_arguments(a: Arguments) -> None:
    x, weight, target, rows, cell = a.x, a.weight, a.target, a.rows, a.cell
    _check.floating("x", x)
    _check.cells("target", target, cell)
    if target.is_complex():
        raise TypeError(f"target has dtype {target.dtype}; expected real numbers")
    _check.index("rows", rows)
    count = rows.shape[0] if a.packed else target.shape[0] * (target.shape[2] // cell) * (target.shape[3] // cell)
    _check.shape("x", x, (count, None), "(rows, channels)" if a.packed else "(cells, channels)")
    _check.parameter("weight", weight, (target.shape[1] * cell * cell, x.shape[1]), "(channels * cell^2, width of x)")
    _check.parameter("bias", a.bias, (weight.shape[0],), "(channels * cell^2,)")
    _check.same_dtype("x", x, "weight", weight, a.dtype)
    if a.valid is not None:
        _check.shape("valid", a.valid, target.shape, "the target's shape")
        if a.valid.dtype != torch.bool:
            raise TypeError(f"valid has dtype {a.valid.dtype}; expected torch.bool")


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    (weight,) = weights_in(storage_dtype(a.x, a.dtype), a.weight)
    total, signs = p.linear_l1(a, weight)
    return total, [signs]


def _backward(p: Primitives, a: Arguments, saved: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    (signs,), (weight,) = saved, weights_in(storage_dtype(a.x, a.dtype), a.weight, last=True)
    p.linear_l1_backward(grad, a, weight, signs, gradients)
    if "target" in gradients:  # the signs back at the pixels they came from
        grad = grad * -a.scale
        pixels = (signs.to(grad.dtype) * grad).to(a.target.dtype)
        gradients["target"] = gather_patches_backward(pixels, a.rows, a.target.shape, a.cell, a.cell, False)


_op = Op(
    "linear_l1",
    Arguments,
    _forward,
    backward=_backward,
    fake=lambda a: (
        a.x.new_empty((), dtype=sum_dtype(a.x.dtype)),
        [a.x.new_empty(a.rows.shape[0], a.weight.shape[0], dtype=torch.int8)],
    ),
    check=_check_arguments,
    request=lambda a: Request((a.dtype or a.x.dtype,)),
    saves=True,
    unsaved=("valid",),
)

"""`linear_l1`, `linear_l2`: a linear head and the sum of its distances to the target. SPEC "Heads and losses".

Both are one operator with an argument that says whether distances are squared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.gather_patches import gather_patches, gather_patches_backward
from sgmim_fast.ops.primitives import Gradients, Primitives, Request, storage_dtype, sum_dtype


class Arguments(NamedTuple):
    """The operator's arguments, see `linear_l1`; `squared` for `linear_l2`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    valid: Tensor | None
    rows: Tensor
    cell: int
    packed: bool
    scale: float
    squared: bool
    normalized: bool
    dtype: torch.dtype | None

    @property
    def factor(self) -> float:
        """Factor of the difference (if `squared`), or of its sign, in the gradient."""
        return 2 * self.scale if self.squared else self.scale

    def pixels(self, dtype: torch.dtype) -> Tensor:
        """Returns the target's pixels of the selected cells, (n, S * cell^2)."""
        return gather_patches(self.target.detach().to(dtype), self.rows, cell=self.cell, patch=self.cell)


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
    normalized: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Scaled sum of |x . weight^T + bias - target| over the selected cells. Of the predictions only signs are saved.

    Plain PyTorch:
    `(F.linear(x, weight, bias) - gather_patches(target, rows, cell=cell, patch=cell)).abs().sum() * scale`.

    Args:
        x: tokens, floating point. With packed=True (n, C), row i belongs to cell rows[i]; with packed=False (cells, C),
            one token per cell of the batch, of which the rows `rows` are read.
        weight: (S * cell^2, C); output channel c * cell^2 + i * cell + j is pixel (i, j) of channel c.
        bias: (S * cell^2,).
        target: (B, S, H, W), any strides; H and W are multiples of `cell`. Used in float32 (float64 if x is).
        rows: (n,) int64, distinct indices into the B * (H / cell) * (W / cell) cells, row-major.
        cell: side of a cell in pixels.
        packed: layout of `x`.
        valid: (B, S, H, W) bool, True where the target counts; None: everywhere.
        normalized: whether to normalise the target per cell, over all channels: subtract the mean and divide by
            sqrt(variance + 1e-6) with the unbiased variance, as MAE (arXiv 2111.06377). Not together with `valid`.
        scale: factor of the sum, 1 / count for a mean.

    Returns:
        A scalar, float32 (float64 if x is). Differentiable in `x`, `weight`, `bias` and `target`; the gradient of |0|
        is 0, as in PyTorch.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    return _op(x, weight, bias, target, valid, rows, cell, packed, scale, False, normalized, None)[0]


def linear_l2(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    rows: Tensor,
    *,
    cell: int,
    packed: bool = True,
    valid: Tensor | None = None,
    normalized: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """`linear_l1` with squared distances; the differences are saved, in the dtype of the gemms.

    Plain PyTorch:
    `(F.linear(x, weight, bias) - gather_patches(target, rows, cell=cell, patch=cell)).square().sum() * scale`.

    Args:
        x, weight, bias, target, rows, cell, packed, valid, normalized, scale: see `linear_l1`.

    Returns:
        A scalar, float32 (float64 if x is). Differentiable in `x`, `weight`, `bias` and `target`.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    return _op(x, weight, bias, target, valid, rows, cell, packed, scale, True, normalized, None)[0]


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
    if a.normalized and a.valid is not None:
        raise ValueError(
            "normalized is given with valid; expected one of them, since the mean needs all pixels of a cell"
        )
    if a.normalized and weight.shape[0] < 2:
        raise ValueError("normalized is given for cells of one value; expected at least two, for a variance")


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    (weight,) = p.weights_in(storage_dtype(a.x, a.dtype), a.weight)
    total, differences = p.linear_l1(a, weight)
    return total, [differences]


def _backward(p: Primitives, a: Arguments, saved: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    (differences,), (weight,) = saved, p.weights_in(storage_dtype(a.x, a.dtype), a.weight, last=True)
    p.linear_l1_backward(grad, a, weight, differences, gradients)
    if "target" in gradients:
        pixels = differences.to(grad.dtype) * (grad * -a.factor)
        if a.normalized:
            pixels = _normalized_backward(pixels, a.pixels(grad.dtype))
        pixels = pixels.to(a.target.dtype)
        gradients["target"] = gather_patches_backward(pixels, a.rows, a.target.shape, a.cell, a.cell, False)


def normalized_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each row less its mean, over sqrt(unbiased variance + 1e-6), and the reciprocal of that root."""
    centred = pixels - pixels.mean(1, keepdim=True)
    inverse = (centred.square().sum(1, keepdim=True) / (pixels.shape[1] - 1) + 1e-6).rsqrt()
    return centred * inverse, inverse


def _normalized_backward(grad: Tensor, pixels: Tensor) -> Tensor:
    normalized, inverse = normalized_pixels(pixels)
    along = (grad * normalized).sum(1, keepdim=True) / (pixels.shape[1] - 1)
    return inverse * (grad - grad.mean(1, keepdim=True) - normalized * along)


def _fake(a: Arguments) -> tuple[Tensor, list[Tensor]]:
    kept = storage_dtype(a.x, a.dtype) if a.squared else torch.int8
    differences = a.x.new_empty(a.rows.shape[0], a.weight.shape[0], dtype=kept)
    return a.x.new_empty((), dtype=sum_dtype(a.x.dtype)), [differences]


_op = Op(
    "linear_l1",
    Arguments,
    _forward,
    backward=_backward,
    fake=_fake,
    check=_check_arguments,
    request=lambda a: Request((a.dtype or a.x.dtype,)),
    saves=True,
    unsaved=("valid",),
)

"""`linear_l1`: a linear head and the summed L1 distance to the pixels it predicts. SPEC "Heads and losses"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops import _check, products
from sgmim_fast.ops._op import Op, absent
from sgmim_fast.ops.gather_patches import gather_patches, gather_patches_backward


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


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    cell: int,
    packed: bool,
    scale: float,
    dtype: torch.dtype | None,
) -> None:
    _check.floating("x", x)
    _check.cells("target", target, cell)
    if target.is_complex():
        raise TypeError(f"target has dtype {target.dtype}; expected real numbers")
    _check.index("rows", rows)
    count = rows.shape[0] if packed else target.shape[0] * (target.shape[2] // cell) * (target.shape[3] // cell)
    _check.shape("x", x, (count, None), "(rows, channels)" if packed else "(cells, channels)")
    _check.parameter("weight", weight, (target.shape[1] * cell * cell, x.shape[1]), "(channels * cell^2, width of x)")
    _check.parameter("bias", bias, (weight.shape[0],), "(channels * cell^2,)")
    _check.same_dtype("x", x, "weight", weight, dtype)
    if valid is not None:
        _check.shape("valid", valid, target.shape, "the target's shape")
        if valid.dtype != torch.bool:
            raise TypeError(f"valid has dtype {valid.dtype}; expected torch.bool")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the sum and of the target in the comparison."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(x: Tensor, rows: Tensor, packed: bool, dtype: torch.dtype | None) -> Tensor:
    """The rows of tokens that are multiplied, contiguous and in the dtype of the products."""
    x = x if packed else x[rows]
    return x.to(products.compute_dtype(dtype or x.dtype, x.device)).contiguous()


def input_gradient(dx: Tensor, x: Tensor, rows: Tensor, packed: bool) -> Tensor:
    """Gradient of the operand's rows as the gradient of `x`."""
    if packed:
        return dx.to(x.dtype)
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device).index_copy_(0, rows, dx.to(x.dtype))


def target_gradient(grad: Tensor, signs: Tensor, target: Tensor, rows: Tensor, cell: int) -> Tensor:
    """The signs back at the pixels they came from."""
    pixels = (signs.to(grad.dtype) * -grad).to(target.dtype)
    return gather_patches_backward(pixels, rows, target.shape, cell, cell, False)


# What is kept of a prediction is its sign: a byte each, (n, outputs) int8, or, by the CUDA backend, packed to bits. Two
# bits each, since it is 0 where the target does not count or is met: for every row 32-bit words of "above", lowest bit
# first, then words of "below". Either backward knows by the dtype.


def packed_shape(count: int, outs: int) -> tuple[int, int, int]:
    """(n, 2, words)."""
    return count, 2, (outs + 31) // 32


def is_packed(signs: Tensor) -> bool:
    """Whether saved signs are bits."""
    return signs.dtype == torch.int32


def unpack_signs(signs: Tensor, outs: int) -> Tensor:
    """Saved signs as a byte each, (n, outs) int8."""
    if not is_packed(signs):
        return signs
    bits = signs[..., None] >> torch.arange(32, device=signs.device, dtype=torch.int32) & 1
    above, below = bits.flatten(2)[..., :outs].to(torch.int8).unbind(1)
    return above - below


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    cell: int,
    packed: bool,
    scale: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]]:
    _check.rows("rows", rows, target.shape[0] * (target.shape[2] // cell) * (target.shape[3] // cell))
    exact, xs = sum_dtype(x.dtype), operand(x, rows, packed, dtype)
    copies = products.copies([weight], xs.dtype)
    prediction = products.linear(xs, *(copies or [weight]), bias).to(exact)
    difference = prediction - gather_patches(target.detach().to(exact), rows, cell=cell, patch=cell)
    if valid is not None:
        difference = torch.where(gather_patches(valid, rows, cell=cell, patch=cell), difference, 0)
    return difference.abs().sum() * scale, [difference.sign().to(torch.int8), *copies]


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    saved: list[Tensor],
    rows: Tensor,
    cell: int,
    packed: bool,
    scale: float,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    # The signs go through the products as they are, exact in every dtype; the scalar is applied to the results.
    signs, *copies = saved
    signs = unpack_signs(signs, weight.shape[0])
    xs, grad = operand(x, rows, packed, dtype), grad * scale
    s = signs.to(xs.dtype)
    grads = [absent(x) for _ in needs]
    if needs[0]:
        dx = products.linear_input_gradient(s, *(copies or [weight])).to(grad.dtype) * grad
        grads[0] = input_gradient(dx, x, rows, packed)
    if needs[1]:
        grads[1] = (products.linear_weight_gradient(s, xs).to(grad.dtype) * grad).to(weight.dtype)
    if needs[2]:
        grads[2] = (signs.sum(0, dtype=grad.dtype) * grad).to(bias.dtype)
    if needs[3]:
        grads[3] = target_gradient(grad, signs, target, rows, cell)
    return grads


def _fake(x, weight, bias, target, valid, rows, cell, packed, scale, dtype):
    signs = x.new_empty(rows.shape[0], weight.shape[0], dtype=torch.int8)
    args = x, weight, bias, target, valid, rows, cell, packed, scale, dtype
    if backends.forced() in (None, "cuda") and backends.can_run("linear_l1", "cuda", *args)[0]:
        signs = x.new_empty(packed_shape(rows.shape[0], weight.shape[0]), dtype=torch.int32)
    copies = products.fake_copies([weight], products.compute_dtype(dtype or x.dtype, x.device))
    return x.new_empty((), dtype=sum_dtype(x.dtype)), [signs, *copies]


_op = Op(
    "linear_l1",
    "(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor? valid, Tensor rows, SymInt cell, bool packed, "
    "float scale, ScalarType? dtype) -> (Tensor, Tensor[])",
    forward=_forward,
    fake=_fake,
    check=_check_arguments,
)


def _save(ctx: Any, inputs: tuple, results: tuple) -> None:
    x, weight, bias, target, _, rows, *ctx.options, ctx.dtype = inputs
    ctx.save_for_backward(x, weight, bias, target, rows, *results[1])


def _gradients(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    x, weight, bias, target, rows, *saved = ctx.saved_tensors
    flags = list(needs[:4])
    return tuple(_op.backward(grad, x, weight, bias, target, saved, rows, *ctx.options, flags, ctx.dtype))


def _fake_backward(grad, x, weight, bias, target, saved, rows, cell, packed, scale, needs, dtype):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else absent(t)
        for t, need in zip((x, weight, bias, target), needs, strict=True)
    ]


_op.differentiable(
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor[] saved, Tensor rows, SymInt cell, "
    "bool packed, float scale, bool[] needs, ScalarType? dtype) -> Tensor[]",
    backward=_backward,
    fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)

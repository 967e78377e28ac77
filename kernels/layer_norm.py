"""LayerNorm with its neighbours: a gather before it in the forward, a residual and a scatter after it in the backward.

Shared by `relational_guidance`, `structure_embed` and `masked_patch_embed`. A row is read once and stays in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.launch import launch
from sgmim_fast.kernels.sums import Sum, partial_sums


@triton.jit
def _forward_kernel(
    x, rows, weight, bias, y, y_rows, statistics, count, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < width)[None, :]
    source = row.to(tl.int64)
    if rows is not None:
        source = tl.load(rows + row, mask=row < count, other=0)
    value = tl.load(x + source[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / width
    centred = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * gain[None, :] + shift[None, :]
    place = row.to(tl.int64)
    if y_rows is not None:
        place = tl.load(y_rows + row, mask=row < count, other=0)
    tl.store(y + place[:, None] * width + column[None, :], out.to(y.dtype.element_ty), mask=inside)
    tl.store(statistics + row, mean, mask=row < count)
    tl.store(statistics + count + row, rstd, mask=row < count)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    rows: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises x[rows], or x; into=(y, y_rows) writes the i-th result at row y_rows[i] of y, for `dtype` then y's.

    Returns y (n, C) in `dtype` and the statistics (2, n), float32: mean and 1 / sqrt(var + eps).
    Cost: reads n rows, writes n rows; 1 launch.
    """
    count, width = (x.shape[0] if rows is None else rows.shape[0]), x.shape[1]
    y, y_rows = into if into is not None else (torch.empty(count, width, dtype=dtype, device=x.device), None)
    statistics = torch.empty(2, count, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    tile = max(1, 2048 // block)
    launch(
        _forward_kernel,
        (triton.cdiv(count, tile),),
        x,
        rows,
        weight,
        bias,
        y,
        y_rows,
        statistics,
        count,
        width,
        eps,
        ROWS=tile,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return y, statistics


@triton.jit
def _backward_kernel(
    dy, more, x, rows, statistics, weight, bias, residual, dx, dx_rows, y, partials, count, width,
    per_program, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    dgain = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum((program + 1) * per_program, count)
    for first in range(program * per_program, last, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if more is not None:
            grad += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        source = at
        if rows is not None:
            source = tl.load(rows + row, mask=row < last, other=0)[:, None] * width + column[None, :]
        value = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row, mask=row < last, other=0.0)[:, None]
        rstd = tl.load(statistics + count + row, mask=row < last, other=0.0)[:, None]
        xhat = tl.where(inside, (value - mean) * rstd, 0.0)
        g = grad * gain
        out = (g - (tl.sum(g, 1) / width)[:, None] - xhat * (tl.sum(g * xhat, 1) / width)[:, None]) * rstd
        if residual is not None:
            out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        place = at
        if dx_rows is not None:
            place = tl.load(dx_rows + row, mask=row < last, other=0)[:, None] * width + column[None, :]
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)
        if y is not None:
            tl.store(y + at, (xhat * gain + shift).to(y.dtype.element_ty), mask=inside)
        dgain += tl.sum(grad * xhat, 0)
        dshift += tl.sum(grad, 0)
    at = program.to(tl.int64) * width + column
    tl.store(partials + at, dgain, mask=column < width)
    tl.store(partials + tl.num_programs(0).to(tl.int64) * width + at, dshift, mask=column < width)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    dx: Tensor,
    *,
    more: Tensor | None = None,
    rows: Tensor | None = None,
    residual: Tensor | None = None,
    dx_rows: Tensor | None = None,
    again: bool = True,
) -> tuple[Tensor | None, list[Sum]]:
    """Writes the gradient of the normalised rows, plus `residual`, into the rows `dx_rows` of dx.

    dy, and `more` which is added to it, are the gradients of the forward's result. Returns that result once more, in
    dy's dtype (None with again=False), and the sums for the gradients of weight and bias, in the weights' dtype.
    Cost: reads dy, x and the residual, writes dx and y, n rows each; 1 launch.
    """
    count, width = dy.shape
    y = torch.empty_like(dy) if again else None
    per_program, partials = partial_sums(count, dy.device, 2, width)
    block = triton.next_power_of_2(width)
    launch(
        _backward_kernel,
        (partials.shape[1],),
        dy,
        more,
        x,
        rows,
        statistics,
        weight,
        bias,
        residual,
        dx,
        dx_rows,
        y,
        partials,
        count,
        width,
        per_program,
        ROWS=max(1, 2048 // block),
        BLOCK=block,
        num_warps=_warps(block),
    )
    return y, [Sum(part, torch.empty_like(weight)) for part in partials]


def _warps(block: int) -> int:
    """About 16 numbers of a row per thread and operand."""
    return min(max(block // 512, 4), 16)

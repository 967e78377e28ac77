"""LayerNorm fused with its neighbours: in the forward a gather before it and a residual after it; in the backward a
residual, a scatter, and sums over rows. Several norms of one width share a launch.

A row is read once and stays in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import cast, inside_of
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2
from sgmim_fast.kernels.sums import MOST_ADDED
from sgmim_fast.ops.primitives import Norm, NormGradient, NormGradients
from sgmim_fast.ops.target import target

# Block of columns up to -> elements of a tensor that a program of the backward holds at a time, warps, and programs per
# multiprocessor: the fastest of 27 combinations measured on an H200 for rows of 256, 512 and 768 numbers.
BACKWARD = {512: (2048, 2, 4), 1 << 14: (1024, 8, 8)}


@triton.jit
def _layer_norm_forward_kernel(
    xs, rows, weights, biases, residuals, ys, y_rows, statistics, counts, limits, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for i in tl.static_range(len(xs)):
        programs = tl.cdiv(counts[i], ROWS)
        if (program >= 0) & (program < programs):
            _normalise(
                program, xs[i], rows[i], weights[i], biases[i], residuals[i], ys[i], y_rows[i], statistics[i],
                counts[i], limits[i], width, eps, ROWS, BLOCK,
            )  # fmt: skip
        program -= programs


@triton.jit
def _normalise(
    program, x, rows, weight, bias, residual, y, y_rows, statistics, count, limit, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < width)[None, :]
    source = row.to(tl.int64)
    if rows is not None:
        source = inside_of(tl.load(rows + row, mask=row < count, other=0), limit)
    value = tl.load(x + source[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / width
    centred = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * w[None, :] + b[None, :]
    place = row.to(tl.int64)
    if residual is not None:
        out += tl.load(residual + place[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if y_rows is not None:
        place = inside_of(tl.load(y_rows + row, mask=row < count, other=0), limit)
    tl.store(y + place[:, None] * width + column[None, :], cast(out, y.dtype.element_ty), mask=inside)
    tl.store(statistics + row, mean, mask=row < count)
    tl.store(statistics + count + row, rstd, mask=row < count)


def layer_norms(norms: Sequence[Norm], eps: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Returns normalised rows (n, C), all of one width, and statistics (2, n) in float32: mean and 1 / sqrt(var + eps).

    Cost: reads n rows, writes n rows; 1 launch.
    """
    counts = [norm.x.shape[0] if norm.rows is None else norm.rows.shape[0] for norm in norms]
    ys = [
        torch.empty(count, norm.x.shape[1], dtype=dtype, device=norm.x.device)
        for count, norm in zip(counts, norms, strict=True)
    ]
    return list(zip(ys, normalise(norms, ys, eps, counts), strict=True))


def normalise(
    norms: Sequence[Norm], ys: Sequence[Tensor], eps: float, counts: Sequence[int], y_rows: Tensor | None = None
) -> list[Tensor]:
    """Writes the normalised rows into ys, or ys[y_rows], and returns the statistics."""
    width = norms[0].x.shape[1]
    xs, weights, biases, rows, residuals = zip(*norms, strict=True)
    statistics = [torch.empty(2, n, dtype=torch.float32, device=ys[0].device) for n in counts]
    block = next_power_of_2(width)
    tile = max(1, 2048 // block)
    launch(
        _layer_norm_forward_kernel,
        (sum(cdiv(n, tile) for n in counts),),
        _contiguous(xs),
        rows,
        _contiguous(weights),
        _contiguous(biases),
        _contiguous(residuals),
        tuple(ys),
        (y_rows,) * len(norms),
        tuple(statistics),
        tuple(counts),
        tuple([(y if norm.rows is None else norm.x).shape[0] for norm, y in zip(norms, ys, strict=True)]),
        width,
        eps,
        ROWS=tile,
        BLOCK=block,
        num_warps=min(max(block // 256, 2), 16),
    )
    return statistics


@triton.jit
def _layer_norm_backward_kernel(
    dys, dy2s, xs, rows, statistics, weights, biases, residuals, dxs, ys, partials, counts, limits, strides,
    width, per_program, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for i in tl.static_range(len(dys)):
        programs = tl.cdiv(counts[i], per_program)
        if (program >= 0) & (program < programs):
            _differentiate(
                program, dys[i], dy2s[i], xs[i], rows[i], statistics[i], weights[i], biases[i], residuals[i], dxs[i],
                ys[i], partials[i], counts[i], limits[i], strides[i], width, per_program, ROWS, BLOCK, SUMS,
            )  # fmt: skip
        program -= programs


@triton.jit
def _differentiate(
    program, dy, dy2, x, rows, statistics, weight, bias, residual, dx, y, partials, count, limit, stride,
    width, per_program, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    # Accumulators have a row per row of the tile: the sum across warps comes once, after the loop.
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    if SUMS > 0:
        residual_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if SUMS > 1:
        dx_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum((program + 1) * per_program, count)
    for first in range(program * per_program, last, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if dy2 is not None:
            grad += tl.load(dy2 + at, mask=inside, other=0.0).to(tl.float32)
        place = at
        if rows is not None:
            place = inside_of(tl.load(rows + row, mask=row < last, other=0), limit)[:, None] * width + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row, mask=row < last, other=0.0)[:, None]
        rstd = tl.load(statistics + count + row, mask=row < last, other=0.0)[:, None]
        xhat = tl.where(inside, (value - mean) * rstd, 0.0)
        g = grad * w
        out = (g - (tl.sum(g, 1) / width)[:, None] - xhat * (tl.sum(g * xhat, 1) / width)[:, None]) * rstd
        if residual is not None:
            added = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            out += added
            if SUMS > 0:
                residual_sum += added
        out = cast(out, dx.dtype.element_ty)
        tl.store(dx + place, out, mask=inside)
        if SUMS > 1:
            dx_sum += tl.where(inside, out.to(tl.float32), 0.0)
        if y is not None:
            tl.store(y + at, cast(xhat * w + b, y.dtype.element_ty), mask=inside)
        dweight += grad * xhat
        dbias += grad
    at = program.to(tl.int64) * width + column
    tl.store(partials + at, tl.sum(dweight, 0), mask=column < width)
    tl.store(partials + stride + at, tl.sum(dbias, 0), mask=column < width)
    if SUMS > 0:
        tl.store(partials + 2 * stride + at, tl.sum(residual_sum, 0), mask=column < width)
    if SUMS > 1:
        tl.store(partials + 3 * stride + at, tl.sum(dx_sum, 0), mask=column < width)


def layer_norms_backward(gradients: Sequence[NormGradient]) -> list[NormGradients]:
    """Returns gradients of norms of one width, which request the same sums. dx has x's dtype.

    Cost: reads dy, x and the residual, writes dx and y, n rows each; 1 launch, and a fill if rows are scattered.
    """
    width, device = gradients[0].dy.shape[1], gradients[0].dy.device
    operands = zip(*(g[:8] for g in gradients), strict=True)
    grads, xs, statistics, weights, biases, rows, dy2s, residuals = operands
    dxs = [
        (torch.empty if g.rows is None else torch.zeros)(g.x.shape, dtype=g.x.dtype, device=device) for g in gradients
    ]
    ys = [torch.empty_like(g.dy) if g.recompute else None for g in gradients]
    counts = [g.dy.shape[0] for g in gradients]
    block = next_power_of_2(width)
    size, warps, programs_each = next(sizes for most, sizes in BACKWARD.items() if block <= most)
    tile, multiple = max(1, size // block), programs_each * target(device).multiprocessors
    per_program = min(cdiv(max(8, cdiv(sum(counts), multiple)), tile), MOST_ADDED) * tile
    programs = [cdiv(count, per_program) for count in counts]
    wanted = 2 if gradients[0].sum_dx else 1 if gradients[0].sum_residual else 0
    partials = [torch.empty(2 + wanted, n, width, dtype=torch.float32, device=device) for n in programs]
    launch(
        _layer_norm_backward_kernel,
        (sum(programs),),
        grads,
        dy2s,
        _contiguous(xs),
        rows,
        statistics,
        _contiguous(weights),
        _contiguous(biases),
        _contiguous(residuals),
        tuple(dxs),
        tuple(ys),
        tuple(partials),
        tuple(counts),
        tuple([x.shape[0] for x in xs]),
        tuple([n * width for n in programs]),
        width,
        per_program,
        ROWS=tile,
        BLOCK=block,
        SUMS=wanted,
        num_warps=max(warps, min(block // 512, 16)),
    )
    return [NormGradients(dx, y, *sums) for dx, y, sums in zip(dxs, ys, partials, strict=True)]


def _contiguous(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple([None if t is None else t.contiguous() for t in tensors])

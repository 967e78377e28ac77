"""`linear_l1` in Triton, primitives: the head's gemm. Its epilogue reads the target in place and saves the signs of the
differences, for `linear_l2` the differences."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import configs, gemm
from sgmim_fast.kernels.arithmetic import cast, dot, inside_of
from sgmim_fast.kernels.launch import cdiv, launch, tf32
from sgmim_fast.kernels.sums import Sum, finish
from sgmim_fast.ops.primitives import Gradients


@triton.jit
def _cell_moments_kernel(
    target,
    rows,
    moments,
    count,
    outs,
    across,
    cells,
    all_cells,
    tb,
    tc,
    th,
    tw,
    CELL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes mean and 1 / sqrt(unbiased variance + 1e-6) of each selected cell's pixels into moments (2, count)."""
    program = tl.program_id(0)
    row = inside_of(tl.load(rows + program), all_cells)
    n = tl.arange(0, BLOCK)
    image, cell = row // cells, row % cells
    y = cell // across * CELL + n % (CELL * CELL) // CELL
    z = cell % across * CELL + n % CELL
    at = image * tb + n // (CELL * CELL) * tc + y * th + z * tw
    pixels = tl.load(target + at, mask=n < outs, other=0.0).to(tl.float32)
    mean = tl.sum(pixels, 0) / outs
    centred = tl.where(n < outs, pixels - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / (outs - 1)
    tl.store(moments + program, mean)
    tl.store(moments + count + program, 1 / tl.sqrt(variance + 1e-6))


@triton.jit
def _linear_l1_forward_kernel(
    x, x_rows, weight, bias, target, valid, rows, moments, kept, partials,
    count, width, outs, across, cells, all_cells,
    tb, tc, th, tw, vb, vc, vh, vw,  # strides of target and valid
    SQUARED: tl.constexpr, CELL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(outs, BLOCK_N)
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    source = m.to(tl.int64)
    if x_rows is not None:
        source = inside_of(tl.load(x_rows + m, mask=m < count, other=0), all_cells)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + source[:, None] * width + k[None, :], mask=(m < count)[:, None] & (k < width)[None, :], other=0)
        at = n.to(tl.int64)[:, None] * width + k[None, :]
        w = tl.load(weight + at, mask=(n < outs)[:, None] & (k < width)[None, :], other=0)
        total = dot(cast(a, w.dtype), tl.trans(w), total, PRECISION)
    total += tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]

    row = inside_of(tl.load(rows + m, mask=m < count, other=0), all_cells)
    inside = (m < count)[:, None] & (n < outs)[None, :]
    image, cell = (row // cells)[:, None], row % cells
    y = (cell // across * CELL)[:, None] + (n % (CELL * CELL) // CELL)[None, :]
    z = (cell % across * CELL)[:, None] + (n % CELL)[None, :]
    channel = (n // (CELL * CELL))[None, :]
    pixel = tl.load(target + image * tb + channel * tc + y * th + z * tw, mask=inside, other=0.0).to(tl.float32)
    if moments is not None:
        mean = tl.load(moments + m, mask=m < count, other=0.0)
        inverse = tl.load(moments + count + m, mask=m < count, other=0.0)
        pixel = (pixel - mean[:, None]) * inverse[:, None]
    difference = tl.where(inside, total - pixel, 0.0)
    if valid is not None:
        counts = tl.load(valid + image * vb + channel * vc + y * vh + z * vw, mask=inside, other=0)
        difference = tl.where(counts != 0, difference, 0.0)
    place = kept + m.to(tl.int64)[:, None] * outs + n[None, :]
    if SQUARED:
        tl.store(place, cast(difference, kept.dtype.element_ty), mask=inside)
        distance = difference * difference
    else:
        tl.store(place, (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8), mask=inside)
        distance = tl.abs(difference)
    tl.store(partials + tl.program_id(0), tl.sum(tl.sum(distance, 1), 0))


def linear_l1(a: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cost: reads x and W per tile and the selected pixels once, writes a byte per pixel (of squared distances a number
    of the weight's dtype); 2 launches, and for normalised pixels 1 more that reads them."""
    x, rows, target = a.x.contiguous(), a.rows.contiguous(), a.target
    count, (outs, width) = rows.shape[0], weight.shape
    kept = torch.empty(count, outs, dtype=weight.dtype if a.squared else torch.int8, device=x.device)
    config = configs.gemm(count, outs, weight.dtype.itemsize)
    tiles = cdiv(count, config.block_m) * cdiv(outs, config.block_n)
    partials = torch.empty(tiles, 1, dtype=torch.float32, device=x.device)
    across = target.shape[3] // a.cell
    cells = across * (target.shape[2] // a.cell)
    moments = None
    if a.normalized:
        moments = torch.empty(2, count, dtype=torch.float32, device=x.device)
        launch(
            _cell_moments_kernel, (count,),
            target, rows, moments, count, outs, across, cells, target.shape[0] * cells, *target.stride(),
            CELL=a.cell, BLOCK=triton.next_power_of_2(outs),
        )  # fmt: skip
    launch(
        _linear_l1_forward_kernel,
        (tiles,),
        x,
        None if a.packed else rows,
        weight,
        a.bias.contiguous(),
        target,
        None if a.valid is None else a.valid.view(torch.uint8),
        rows,
        moments,
        kept,
        partials,
        count,
        width,
        outs,
        across,
        cells,
        target.shape[0] * cells,
        *target.stride(),
        *((0, 0, 0, 0) if a.valid is None else a.valid.stride()),
        SQUARED=a.squared,
        CELL=a.cell,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION=tf32(),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    total = torch.empty((), dtype=torch.float32, device=x.device)
    finish([Sum(partials, total.view(1))], factor=a.scale)
    return total, kept


def linear_l1_backward(grad: Tensor, a: Any, weight: Tensor, differences: Tensor, gradients: Gradients) -> None:
    """Cost: reads the signs twice, W and x once per tile; 2 launches, and a fill if x is not packed."""
    x, listed = a.x.contiguous(), None if a.packed else a.rows.contiguous()
    if "x" in gradients:
        gradients["x"] = dx = torch.empty_like(x) if a.packed else torch.zeros_like(x)
        gemm.dgrad_of_signs(differences, weight, grad, a.factor, dx, listed)
    if "weight" in gradients or "bias" in gradients:
        gradients["weight"] = dweight = torch.empty_like(a.weight, memory_format=torch.contiguous_format)
        gradients["bias"] = dbias = torch.empty(a.bias.shape, dtype=a.bias.dtype, device=x.device)
        gemm.wgrad_of_signs(differences, x, weight.dtype, grad, a.factor, listed, dweight, dbias)

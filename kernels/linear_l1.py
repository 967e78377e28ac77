"""`linear_l1` in Triton: the head's product, whose epilogue reads the pixels where they are and keeps only signs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import configs, products
from sgmim_fast.kernels.arithmetic import cast, dot, inside_of
from sgmim_fast.kernels.launch import cdiv, copies_of, launch, on_device, supported, tf32
from sgmim_fast.kernels.launch import target as machine
from sgmim_fast.kernels.sums import Sum, finish
from sgmim_fast.ops import products as dtypes
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.linear_l1 import is_packed, target_gradient


@triton.jit
def _linear_l1_forward_kernel(
    x, x_rows, weight, bias, target, valid, rows, signs, partials, count, width, outs, across, cells, all_cells,
    tb, tc, th, tw, vb, vc, vh, vw,  # strides of target and valid
    CELL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
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
    difference = tl.where(inside, total - pixel, 0.0)
    if valid is not None:
        counts = tl.load(valid + image * vb + channel * vc + y * vh + z * vw, mask=inside, other=0)
        difference = tl.where(counts != 0, difference, 0.0)
    sign = (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)
    tl.store(signs + m.to(tl.int64)[:, None] * outs + n[None, :], sign, mask=inside)
    tl.store(partials + tl.program_id(0), tl.sum(tl.sum(tl.abs(difference), 1), 0))


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    x, dtype = args[0] if part == "forward" else args[1], args[-1]
    if part == "backward" and is_packed(args[5][0]):
        return False, "the cuda backend ran the forward, and packed the signs to bits"
    return supported(dtype or x.dtype)


@on_device
def forward(
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
    """Cost: reads x and W for each tile, the wanted pixels once, writes a byte per pixel; 3 launches."""
    compute = dtypes.compute_dtype(dtype or x.dtype, x.device)
    copies = copies_of([weight], compute)
    w = copies[0] if copies else weight.contiguous()
    x, rows = x.contiguous(), rows.contiguous()
    count, (outs, width) = rows.shape[0], w.shape
    signs = torch.empty(count, outs, dtype=torch.int8, device=x.device)
    config = configs.product(count, outs, compute.itemsize, machine(x.device).architecture)
    tiles = cdiv(count, config.block_m) * cdiv(outs, config.block_n)
    partials = torch.empty(tiles, 1, dtype=torch.float32, device=x.device)
    across = target.shape[3] // cell
    launch(
        _linear_l1_forward_kernel,
        (tiles,),
        x,
        None if packed else rows,
        w,
        bias.contiguous(),
        target,
        None if valid is None else valid.view(torch.uint8),
        rows,
        signs,
        partials,
        count,
        width,
        outs,
        across,
        across * (target.shape[2] // cell),
        target.shape[0] * across * (target.shape[2] // cell),
        *target.stride(),
        *((0, 0, 0, 0) if valid is None else valid.stride()),
        CELL=cell,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION=tf32(),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    total = torch.empty((), dtype=torch.float32, device=x.device)
    finish([Sum(partials, total.view(1))], factor=scale)
    return total, [signs, *copies]


@on_device
def backward(
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
    """Cost: reads the signs twice, W and x once per tile; 2 launches, and where x is not packed a fill."""
    signs, *copies = saved
    grads = [absent(x) for _ in needs]
    x, rows = x.contiguous(), rows.contiguous()
    listed = None if packed else rows
    if needs[0]:
        w = copies[0] if copies else weight.contiguous()
        grads[0] = torch.empty_like(x) if packed else torch.zeros_like(x)
        products.input_gradient_of_signs(signs, w, grad, scale, grads[0], listed)
    if needs[1] or needs[2]:
        compute = dtypes.compute_dtype(dtype or x.dtype, x.device)
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        dbias = torch.empty_like(bias)
        products.weight_gradients_of_signs(signs, x, compute, grad, scale, listed, dweight, dbias)
        grads[1], grads[2] = dweight if needs[1] else grads[1], dbias if needs[2] else grads[2]
    if needs[3]:
        grads[3] = target_gradient(grad * scale, signs, target, rows, cell)
    return grads

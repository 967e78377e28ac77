"""`structure_embed` in Triton: gather, patch embedding, its norm and the first merging's norm in one pass over pixels.

A merging's norm is not fused with its product: each tile of columns would normalise the same rows again (8 to 16 times
at these widths), between the loads and the tensor cores, and the backward needs the normalised rows for the weight
gradient anyway. Cost with three mergings, half precision: forward 7 launches, backward 8; `benchmarks/cost_model.py`
has bytes and predicted times, none is measured yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import products
from sgmim_fast.kernels.arithmetic import TYPES, cast, dot, inside_of
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2, rows_per_program, tf32
from sgmim_fast.ops.primitives import Gradients
from sgmim_fast.ops.structure_embed import Cells, StructureParameters
from sgmim_fast.ops.weights import weights_in


@triton.jit
def _pixels(
    structure, rows, token, shown, cells, across, all_cells, sb, sc, sh, sw,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, MERGES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Patches in Z-order inside their cell, (tokens, BLOCK_K)."""
    PER_CELL: tl.constexpr = 4**MERGES
    z = (token % PER_CELL).to(tl.int32)
    y, x = 0 * z, 0 * z
    for level in tl.static_range(MERGES):  # the row's bit below the column's at each level
        y += (z >> (2 * level) & 1) << level
        x += (z >> (2 * level + 1) & 1) << level
    cell = inside_of(tl.load(rows + token // PER_CELL, mask=shown, other=0), all_cells)
    y = (cell % cells // across * 2**MERGES + y) * PATCH
    x = (cell % across * 2**MERGES + x) * PATCH
    k = tl.arange(0, BLOCK_K)
    channel, row, column = k // (PATCH * PATCH), k % (PATCH * PATCH) // PATCH, k % PATCH
    at = (cell // cells * sb)[:, None] + channel[None, :] * sc
    at += (y[:, None] + row[None, :]) * sh + (x[:, None] + column[None, :]) * sw
    inside = shown[:, None] & (k < CHANNELS * PATCH * PATCH)[None, :]
    return tl.load(structure + at, mask=inside, other=0.0)


@triton.jit
def _embed(pixels, weight, bias, width, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
           DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    d, k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    w = tl.load(weight + d[None, :] * K + k[:, None], mask=(d < width)[None, :] & (k < K)[:, None], other=0.0)
    embedded = dot(cast(pixels, DTYPE), cast(w, DTYPE), tl.zeros([pixels.shape[0], BLOCK_D], tl.float32), PRECISION)
    return embedded + tl.load(bias + d, mask=d < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _vector(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _quarters(x, width, BLOCK_D: tl.constexpr):
    """A merging norm's vector of 4 width numbers as (1, 4, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)
    at = tl.arange(0, 4)[:, None] * width + d[None, :]
    return tl.load(x + at, mask=(d < width)[None, :] & (at >= 0), other=0.0).to(tl.float32)[None, :, :]


@triton.jit
def _structure_embed_forward_kernel(
    structure, rows, weight, bias, gain, shift, merge_gain, merge_shift, y, statistics, merge_statistics,
    count, merged, eps, cells, across, all_cells, sb, sc, sh, sw, width,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, MERGES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    token = program * ROWS * 4 + tl.arange(0, 4 * ROWS)
    shown = token < count
    d = tl.arange(0, BLOCK_D)
    inside = shown[:, None] & (d < width)[None, :]
    pixels = _pixels(
        structure, rows, token, shown, cells, across, all_cells, sb, sc, sh, sw, CHANNELS, PATCH, MERGES, BLOCK_K
    )
    x = _embed(pixels, weight, bias, width, CHANNELS * PATCH * PATCH, BLOCK_K, BLOCK_D, DTYPE, PRECISION)
    x = tl.where(inside, x, 0.0)
    mean = tl.sum(x, 1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    tl.store(statistics + token, mean, mask=shown)
    tl.store(statistics + count + token, rstd, mask=shown)
    # the patch norm's result, 0 in the hidden cell, four neighbours side by side
    x = centred * rstd[:, None] * _vector(gain, width, BLOCK_D) + _vector(shift, width, BLOCK_D)
    x = tl.reshape(tl.where(inside, x, 0.0), [ROWS, 4, BLOCK_D])
    row = program * ROWS + tl.arange(0, ROWS)
    mean = tl.sum(tl.sum(x, 2), 1) / (4 * width)
    centred = tl.where((d < width)[None, None, :], x - mean[:, None, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(tl.sum(centred * centred, 2), 1) / (4 * width) + eps)
    tl.store(merge_statistics + row, mean, mask=row < merged)
    tl.store(merge_statistics + merged + row, rstd, mask=row < merged)
    x = centred * rstd[:, None, None] * _quarters(merge_gain, width, BLOCK_D) + _quarters(merge_shift, width, BLOCK_D)
    at = row[:, None, None] * 4 * width + tl.arange(0, 4)[None, :, None] * width + d[None, None, :]
    inside = (row < merged)[:, None, None] & (d < width)[None, None, :]
    tl.store(y + at, cast(x, y.dtype.element_ty), mask=inside & (at >= 0))


@triton.jit
def _structure_embed_backward_kernel(
    dy, structure, rows, weight, bias, gain, shift, merge_gain, merge_shift, statistics, merge_statistics,
    y, dembedded, dmerge_gain, dmerge_shift, dgain, dshift, dbias, dweight,
    count, merged, cells, across, all_cells, sb, sc, sh, sw, width, per_program,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, MERGES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d, four = tl.arange(0, BLOCK_D), tl.arange(0, 4)
    gains, shifts = _vector(gain, width, BLOCK_D), _vector(shift, width, BLOCK_D)
    merge_gains, merge_shifts = _quarters(merge_gain, width, BLOCK_D), _quarters(merge_shift, width, BLOCK_D)
    sum_merge_gain = tl.zeros([4, BLOCK_D], tl.float32)
    sum_merge_shift = tl.zeros([4, BLOCK_D], tl.float32)
    sum_gain = tl.zeros([BLOCK_D], tl.float32)
    sum_shift = tl.zeros([BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_D], tl.float32)
    sum_weight = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    last = tl.minimum((program + 1) * per_program, merged)
    for first in range(program * per_program, last, ROWS):
        row = first + tl.arange(0, ROWS)
        token = first * 4 + tl.arange(0, 4 * ROWS)
        shown = token < tl.minimum(count, 4 * last)
        inside = shown[:, None] & (d < width)[None, :]
        inside_merged = (row < last)[:, None, None] & (d < width)[None, None, :] & (four >= 0)[None, :, None]
        # the forward again
        pixels = _pixels(
            structure, rows, token, shown, cells, across, all_cells, sb, sc, sh, sw, CHANNELS, PATCH, MERGES, BLOCK_K
        )
        x = _embed(pixels, weight, bias, width, CHANNELS * PATCH * PATCH, BLOCK_K, BLOCK_D, DTYPE, PRECISION)
        mean = tl.load(statistics + token, mask=shown, other=0.0)
        rstd = tl.load(statistics + count + token, mask=shown, other=0.0)
        xhat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        x = tl.reshape(tl.where(inside, xhat * gains + shifts, 0.0), [ROWS, 4, BLOCK_D])
        mean = tl.load(merge_statistics + row, mask=row < last, other=0.0)
        merge_rstd = tl.load(merge_statistics + merged + row, mask=row < last, other=0.0)[:, None, None]
        merge_xhat = tl.where(inside_merged, (x - mean[:, None, None]) * merge_rstd, 0.0)
        at = row[:, None, None] * 4 * width + four[None, :, None] * width + d[None, None, :]
        tl.store(y + at, cast(merge_xhat * merge_gains + merge_shifts, y.dtype.element_ty), mask=inside_merged)
        # the merging's norm
        grad = tl.load(dy + at, mask=inside_merged, other=0.0).to(tl.float32)
        sum_merge_gain += tl.sum(grad * merge_xhat, 0)
        sum_merge_shift += tl.sum(grad, 0)
        g = grad * merge_gains
        mean = tl.sum(tl.sum(g, 2), 1) / (4 * width)
        slope = tl.sum(tl.sum(g * merge_xhat, 2), 1) / (4 * width)
        grad = (g - mean[:, None, None] - merge_xhat * slope[:, None, None]) * merge_rstd
        # the patches' norm
        grad = tl.where(inside, tl.reshape(grad, [4 * ROWS, BLOCK_D]), 0.0)
        sum_gain += tl.sum(grad * xhat, 0)
        sum_shift += tl.sum(grad, 0)
        g = grad * gains
        grad = (g - (tl.sum(g, 1) / width)[:, None] - xhat * (tl.sum(g * xhat, 1) / width)[:, None]) * rstd[:, None]
        grad = tl.where(inside, grad, 0.0)
        sum_bias += tl.sum(grad, 0)
        sum_weight = dot(tl.trans(cast(pixels, DTYPE)), cast(grad, DTYPE), sum_weight, PRECISION)
        if dembedded is not None:
            at = token[:, None] * width + d[None, :]
            tl.store(dembedded + at, cast(grad, dembedded.dtype.element_ty), mask=inside)
    at = four[:, None] * width + d[None, :]
    inside = (d < width)[None, :] & (at >= 0)
    tl.store(dmerge_gain + program * 4 * width + at, sum_merge_gain, mask=inside)
    tl.store(dmerge_shift + program * 4 * width + at, sum_merge_shift, mask=inside)
    at = program * width + d
    tl.store(dgain + at, sum_gain, mask=d < width)
    tl.store(dshift + at, sum_shift, mask=d < width)
    tl.store(dbias + at, sum_bias, mask=d < width)
    k = tl.arange(0, BLOCK_K)
    K: tl.constexpr = CHANNELS * PATCH * PATCH
    at = program * width * K + d[None, :] * K + k[:, None]
    tl.store(dweight + at, sum_weight, mask=(d < width)[None, :] & (k < K)[:, None])


class _Shape(NamedTuple):
    """Sizes and options that forward and backward launch with."""

    pixels: tuple[int, ...]  # cells of an image, cells across, all cells, strides of the map
    options: dict[str, Any]


def _shape(cells: Cells) -> _Shape:
    width, channels, patch, _ = cells.w.embed_weight.shape
    block_d, structure = max(next_power_of_2(width), 16), cells.structure
    options = {
        "CHANNELS": channels,
        "PATCH": patch,
        "MERGES": len(cells.w.merge_weights),
        "ROWS": 8 if block_d <= 64 else 4,
        "BLOCK_K": max(next_power_of_2(channels * patch * patch), 16),
        "BLOCK_D": block_d,
        "DTYPE": TYPES[cells.dtype],
        "PRECISION": tf32(),
        "num_warps": 8 if block_d <= 256 else 16,
    }
    across = structure.shape[3] // cells.cell
    an_image = across * (structure.shape[2] // cells.cell)
    return _Shape((an_image, across, structure.shape[0] * an_image, *structure.stride()), options)


def _vectors(w: StructureParameters) -> list[Tensor]:
    vectors = w.embed_weight, w.embed_bias, w.norm_weight, w.norm_bias, w.merge_norm_weights[0], w.merge_norm_biases[0]
    return [vector.contiguous() for vector in vectors]


def embedded(cells: Cells) -> int:
    return 1


def embed(cells: Cells, weight: Tensor, eps: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cost: reads the shown pixels, writes the normalised rows and their statistics; 1 launch and the gemm."""
    shape, device = _shape(cells), cells.structure.device
    statistics = [torch.empty(2, n, dtype=torch.float32, device=device) for n in (cells.count, cells.merged)]
    y = torch.empty(cells.merged, weight.shape[1], dtype=cells.dtype, device=device)
    launch(
        _structure_embed_forward_kernel,
        (cdiv(cells.merged, shape.options["ROWS"]),),
        cells.structure,
        cells.rows,
        *_vectors(cells.w),
        y,
        *statistics,
        cells.count,
        cells.merged,
        eps,
        *shape.pixels,
        cells.w.embed_weight.shape[0],
        **shape.options,
    )
    return products.linear(y, weight), [], statistics


def embed_backward(
    dx: Tensor, cells: Cells, weight: Tensor, inputs: list[Tensor], statistics: list[Tensor], gradients: Gradients
) -> Tensor | None:
    """Cost: reads dy and the shown pixels, writes the normalised rows, and the embedded patches' gradient if it is
    wanted; 1 launch and the gemms."""
    (dy,), shape, device = products.dgrads([dx], [weight]), _shape(cells), dx.device
    width, rows_of_a_tile = cells.w.embed_weight.shape[0], shape.options["ROWS"]
    per_program = cdiv(rows_per_program(cells.merged, device), rows_of_a_tile) * rows_of_a_tile
    programs, vectors = cdiv(cells.merged, per_program), _vectors(cells.w)
    names = "merge_norm_weights[0]", "merge_norm_biases[0]", "norm_weight", "norm_bias", "embed_bias", "embed_weight"
    sums = {
        name: torch.empty(programs, vector.numel(), dtype=torch.float32, device=device)
        for name, vector in zip(names, (*vectors[4:], *vectors[2:4], vectors[1], vectors[0]), strict=True)
    }
    y, dembedded = torch.empty_like(dy), None
    if "structure" in gradients:
        dembedded = torch.empty(cells.count, width, dtype=dy.dtype, device=device)
    launch(
        _structure_embed_backward_kernel,
        (programs,),
        dy,
        cells.structure,
        cells.rows,
        *vectors,
        *statistics[:2],
        y,
        dembedded,
        *sums.values(),
        cells.count,
        cells.merged,
        *shape.pixels,
        width,
        per_program,
        **shape.options,
    )
    gradients.sums(sums)
    gradients.weight("merge_weights[0]", dx, y)
    if dembedded is None:
        return None
    (embed_weight,) = weights_in(cells.dtype, cells.w.embed_weight)
    return products.dgrads([dembedded], [embed_weight.flatten(1)])[0]

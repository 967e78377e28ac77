"""`structure_embed` in Triton: gather, patch embedding, its norm and the first merging's norm in one pass over pixels.

A merging's norm is not fused with its gemm: each tile of columns would normalise the same rows again (8 to 16 times at
these widths), between loads and tensor cores, and the backward needs the normalised rows anyway, for the wgrad. Cost
with
three mergings in half precision: 7 launches forward, 8 backward. `benchmarks/cost_model.py` has bytes and predicted
times, `benchmarks/results/gpu-*` measured ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import gemm
from sgmim_fast.kernels.arithmetic import TYPES, cast, dot, inside_of
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2, rows_per_program, tf32
from sgmim_fast.ops.primitives import Gradients
from sgmim_fast.ops.structure_embed import Cells, StructureParameters
from sgmim_fast.ops.weights import weights_in

# Arguments are passed in groups: `image` (structure, rows, cells, across, all_cells, its four strides) and `parameters`
# (weight and bias of the embedding, of the patches' norm, of the merging's). Four neighbouring patches are a row of the
# merging: a tile is (4 * ROWS, BLOCK_D) and, reshaped, (ROWS, 4, BLOCK_D).


@triton.jit
def _pixels(
    image, token, shown,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, MERGES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loads patches (tokens, BLOCK_K), in Z-order within their cell."""
    structure, rows, cells, across, all_cells, sb, sc, sh, sw = image
    PER_CELL: tl.constexpr = 4**MERGES
    z = (token % PER_CELL).to(tl.int32)
    y, x = 0 * z, 0 * z
    for level in tl.static_range(MERGES):  # at each level the row's bit is below the column's
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
def _embed(
    pixels, weight, bias, width,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d, k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    w = tl.load(weight + d[None, :] * K + k[:, None], mask=(d < width)[None, :] & (k < K)[:, None], other=0.0)
    embedded = dot(cast(pixels, DTYPE), cast(w, DTYPE), tl.zeros([pixels.shape[0], BLOCK_D], tl.float32), PRECISION)
    return embedded + tl.load(bias + d, mask=d < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _vector(x, width, BLOCK_D: tl.constexpr):
    """Loads a parameter of the patches' norm, (1, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _quarters(x, width, BLOCK_D: tl.constexpr):
    """Loads a parameter of the merging's norm, (1, 4, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)
    at = tl.arange(0, 4)[:, None] * width + d[None, :]
    return tl.load(x + at, mask=(d < width)[None, :] & (at >= 0), other=0.0).to(tl.float32)[None, :, :]


@triton.jit
def _row_sum(x):
    """Sums over all axes but the first, for rows of patches (2-D) or of the merging (3-D)."""
    if len(x.shape) == 3:
        x = tl.sum(x, 2)
    return tl.sum(x, 1)


@triton.jit
def _of_rows(numbers, x):
    """Expands one number per row to the dimensions of x."""
    numbers = numbers[:, None]
    if len(x.shape) == 3:
        numbers = numbers[:, :, None]
    return numbers


@triton.jit
def _statistics(x, inside, width, eps):
    """Returns x - mean, mean and 1 / sqrt(var + eps) of rows of `width` elements."""
    mean = _row_sum(x) / width
    centred = tl.where(inside, x - _of_rows(mean, x), 0.0)
    return centred, mean, 1 / tl.sqrt_rn(_row_sum(centred * centred) / width + eps)


@triton.jit
def _normalised(x, inside, statistics, row, here, count):
    """Returns xhat and 1 / sqrt(var + eps) from saved statistics (2, count)."""
    mean = tl.load(statistics + row, mask=here, other=0.0)
    rstd = _of_rows(tl.load(statistics + count + row, mask=here, other=0.0), x)
    return tl.where(inside, (x - _of_rows(mean, x)) * rstd, 0.0), rstd


@triton.jit
def _norm_backward(dy, weight, xhat, rstd, width):
    g = dy * weight
    mean, slope = _row_sum(g) / width, _row_sum(g * xhat) / width
    return (g - _of_rows(mean, g) - xhat * _of_rows(slope, g)) * rstd


@triton.jit
def _structure_embed_forward_kernel(
    image, parameters, y, statistics, merge_statistics, count, merged, width, eps,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, MERGES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = CHANNELS * PATCH * PATCH
    weight, bias, norm_weight, norm_bias, merge_weight, merge_bias = parameters
    program = tl.program_id(0).to(tl.int64)
    token, row = program * ROWS * 4 + tl.arange(0, 4 * ROWS), program * ROWS + tl.arange(0, ROWS)
    d, quarter, shown = tl.arange(0, BLOCK_D), tl.arange(0, 4), token < count
    inside = shown[:, None] & (d < width)[None, :]
    inside_merged = (row < merged)[:, None, None] & (quarter >= 0)[None, :, None] & (d < width)[None, None, :]
    # the embedding and its norm
    pixels = _pixels(image, token, shown, CHANNELS, PATCH, MERGES, BLOCK_K)
    embedded = _embed(pixels, weight, bias, width, K, BLOCK_K, BLOCK_D, DTYPE, PRECISION)
    centred, mean, rstd = _statistics(tl.where(inside, embedded, 0.0), inside, width, eps)
    tl.store(statistics + token, mean, mask=shown)
    tl.store(statistics + count + token, rstd, mask=shown)
    patches = centred * rstd[:, None] * _vector(norm_weight, width, BLOCK_D) + _vector(norm_bias, width, BLOCK_D)
    # the merging's norm; the hidden cell's patches are zero
    merge = tl.reshape(tl.where(inside, patches, 0.0), [ROWS, 4, BLOCK_D])
    centred, mean, rstd = _statistics(merge, (d < width)[None, None, :], 4 * width, eps)
    tl.store(merge_statistics + row, mean, mask=row < merged)
    tl.store(merge_statistics + merged + row, rstd, mask=row < merged)
    merge = centred * _of_rows(rstd, centred) * _quarters(merge_weight, width, BLOCK_D)
    merge += _quarters(merge_bias, width, BLOCK_D)
    at = row[:, None, None] * 4 * width + quarter[None, :, None] * width + d[None, None, :]
    tl.store(y + at, cast(merge, y.dtype.element_ty), mask=inside_merged)


@triton.jit
def _structure_embed_backward_kernel(
    dy, image, parameters, statistics, merge_statistics, y, dembedded, sums, count, merged, width, per_program,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, MERGES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = CHANNELS * PATCH * PATCH
    weight, bias, norm_weight, norm_bias, merge_weight, merge_bias = parameters
    program = tl.program_id(0).to(tl.int64)
    d, quarter = tl.arange(0, BLOCK_D), tl.arange(0, 4)
    norm_weights, norm_biases = _vector(norm_weight, width, BLOCK_D), _vector(norm_bias, width, BLOCK_D)
    merge_weights, merge_biases = _quarters(merge_weight, width, BLOCK_D), _quarters(merge_bias, width, BLOCK_D)
    sum_merge_weight = tl.zeros([4, BLOCK_D], tl.float32)
    sum_merge_bias = tl.zeros([4, BLOCK_D], tl.float32)
    sum_norm_weight = tl.zeros([BLOCK_D], tl.float32)
    sum_norm_bias = tl.zeros([BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_D], tl.float32)
    sum_weight = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    last = tl.minimum((program + 1) * per_program, merged)
    for first in range(program * per_program, last, ROWS):
        row, token = first + tl.arange(0, ROWS), first * 4 + tl.arange(0, 4 * ROWS)
        shown = token < tl.minimum(count, 4 * last)
        inside = shown[:, None] & (d < width)[None, :]
        inside_merged = (row < last)[:, None, None] & (d < width)[None, None, :] & (quarter >= 0)[None, :, None]
        # recompute the forward
        pixels = _pixels(image, token, shown, CHANNELS, PATCH, MERGES, BLOCK_K)
        embedded = _embed(pixels, weight, bias, width, K, BLOCK_K, BLOCK_D, DTYPE, PRECISION)
        xhat, rstd = _normalised(embedded, inside, statistics, token, shown, count)
        merge = tl.reshape(tl.where(inside, xhat * norm_weights + norm_biases, 0.0), [ROWS, 4, BLOCK_D])
        merge_xhat, merge_rstd = _normalised(merge, inside_merged, merge_statistics, row, row < last, merged)
        at = row[:, None, None] * 4 * width + quarter[None, :, None] * width + d[None, None, :]
        tl.store(y + at, cast(merge_xhat * merge_weights + merge_biases, y.dtype.element_ty), mask=inside_merged)
        # the merging's norm
        dmerge = tl.load(dy + at, mask=inside_merged, other=0.0).to(tl.float32)
        sum_merge_weight += tl.sum(dmerge * merge_xhat, 0)
        sum_merge_bias += tl.sum(dmerge, 0)
        dmerge = _norm_backward(dmerge, merge_weights, merge_xhat, merge_rstd, 4 * width)
        # the patches' norm
        dpatches = tl.where(inside, tl.reshape(dmerge, [4 * ROWS, BLOCK_D]), 0.0)
        sum_norm_weight += tl.sum(dpatches * xhat, 0)
        sum_norm_bias += tl.sum(dpatches, 0)
        # the embedding
        grad = tl.where(inside, _norm_backward(dpatches, norm_weights, xhat, rstd, width), 0.0)
        sum_bias += tl.sum(grad, 0)
        sum_weight = dot(tl.trans(cast(pixels, DTYPE)), cast(grad, DTYPE), sum_weight, PRECISION)
        if dembedded is not None:
            at = token[:, None] * width + d[None, :]
            tl.store(dembedded + at, cast(grad, dembedded.dtype.element_ty), mask=inside)
    dmerge_weight, dmerge_bias, dnorm_weight, dnorm_bias, dbias, dweight = sums
    at = quarter[:, None] * width + d[None, :]
    inside = (d < width)[None, :] & (at >= 0)
    tl.store(dmerge_weight + program * 4 * width + at, sum_merge_weight, mask=inside)
    tl.store(dmerge_bias + program * 4 * width + at, sum_merge_bias, mask=inside)
    at = program * width + d
    tl.store(dnorm_weight + at, sum_norm_weight, mask=d < width)
    tl.store(dnorm_bias + at, sum_norm_bias, mask=d < width)
    tl.store(dbias + at, sum_bias, mask=d < width)
    k = tl.arange(0, BLOCK_K)
    at = program * width * K + d[None, :] * K + k[:, None]
    tl.store(dweight + at, sum_weight, mask=(d < width)[None, :] & (k < K)[:, None])


def _image(cells: Cells) -> tuple[Any, ...]:
    """Returns the group `image` of the kernels' arguments."""
    structure = cells.structure
    across = structure.shape[3] // cells.cell
    an_image = across * (structure.shape[2] // cells.cell)
    return structure, cells.rows, an_image, across, structure.shape[0] * an_image, *structure.stride()


def _parameters(w: StructureParameters) -> tuple[Tensor, ...]:
    vectors = w.embed_weight, w.embed_bias, w.norm_weight, w.norm_bias, w.merge_norm_weights[0], w.merge_norm_biases[0]
    return tuple(vector.contiguous() for vector in vectors)


def _options(cells: Cells) -> dict[str, Any]:
    width, channels, patch, _ = cells.w.embed_weight.shape
    block_d = max(next_power_of_2(width), 16)
    return {
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


def embedded(cells: Cells) -> int:
    return 1


def embed(cells: Cells, weight: Tensor, eps: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cost: reads the shown pixels, writes the normalised rows and their statistics; 1 launch and the gemm."""
    options, device, width = _options(cells), cells.structure.device, cells.w.embed_weight.shape[0]
    statistics = [torch.empty(2, n, dtype=torch.float32, device=device) for n in (cells.count, cells.merged)]
    y = torch.empty(cells.merged, weight.shape[1], dtype=cells.dtype, device=device)
    grid, sizes = (cdiv(cells.merged, options["ROWS"]),), (cells.count, cells.merged, width)
    image, parameters = _image(cells), _parameters(cells.w)
    launch(_structure_embed_forward_kernel, grid, image, parameters, y, *statistics, *sizes, eps, **options)
    return gemm.linear(y, weight), [], statistics


def embed_backward(
    dx: Tensor, cells: Cells, weight: Tensor, inputs: list[Tensor], statistics: list[Tensor], gradients: Gradients
) -> Tensor | None:
    """Cost: reads dy and the shown pixels, writes the normalised rows, and the gradient of the embedded patches if
    needed; 1 launch and the gemms."""
    dy, options, device = gemm.dgrad(dx, weight), _options(cells), dx.device
    width, rows_of_a_tile = cells.w.embed_weight.shape[0], options["ROWS"]
    per_program = cdiv(rows_per_program(cells.merged, device), rows_of_a_tile) * rows_of_a_tile
    programs, parameters = cdiv(cells.merged, per_program), _parameters(cells.w)
    names = "merge_norm_weights[0]", "merge_norm_biases[0]", "norm_weight", "norm_bias", "embed_bias", "embed_weight"
    sums = {
        name: torch.empty(programs, parameter.numel(), dtype=torch.float32, device=device)
        for name, parameter in zip(names, (*parameters[4:], *parameters[2:4], *parameters[1::-1]), strict=True)
    }
    y, dembedded = torch.empty_like(dy), None
    if "structure" in gradients:
        dembedded = torch.empty(cells.count, width, dtype=dy.dtype, device=device)
    results = y, dembedded, tuple(sums.values())
    sizes = cells.count, cells.merged, width, per_program
    arguments = dy, _image(cells), parameters, *statistics[:2], *results, *sizes
    launch(_structure_embed_backward_kernel, (programs,), *arguments, **options)
    gradients.sums(sums)
    gradients.weight("merge_weights[0]", dx, y)
    if dembedded is None:
        return None
    (embed_weight,) = weights_in(cells.dtype, cells.w.embed_weight)
    return gemm.dgrad(dembedded, embed_weight.flatten(1))

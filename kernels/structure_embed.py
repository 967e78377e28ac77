"""`structure_embed` in Triton: gather, patch embedding and its norm in one pass over the pixels.

The embedded patches are recomputed in the backward instead of saved: one pass that writes them. The mergings' norms are
the kernels of `layer_norm`. One kernel for both norms, which read and wrote less, took 5 times as long on an H200 in
the backward: with its eight operands and accumulators in registers, a multiprocessor held 2 tiles of 16 patches, and
each waited for sums over a merging's four patches, which several warps share.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import gemm
from sgmim_fast.kernels.arithmetic import TYPES, cast, dot, inside_of
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2, tf32
from sgmim_fast.kernels.layer_norm import layer_norms, layer_norms_backward
from sgmim_fast.ops.primitives import Gradients, Norm, NormGradient
from sgmim_fast.ops.structure_embed import Cells
from sgmim_fast.ops.target import target
from sgmim_fast.ops.weights import weights_in

# Arguments are passed in groups: `image` (structure, rows, cells, across, all_cells, its four strides) and `parameters`
# (weight and bias of the embedding, of the patches' norm).


WARPS = 16  # of the backward, per multiprocessor


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
    """Loads a parameter of the norm, (1, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _structure_embed_forward_kernel(
    image, parameters, y, statistics, count, rows, width, eps, SAVED: tl.constexpr,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, MERGES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the normalised patches, and zeros in the rows of the hidden cell, which come last. SAVED: whether the
    statistics are given instead of computed."""
    K: tl.constexpr = CHANNELS * PATCH * PATCH
    weight, bias, norm_weight, norm_bias = parameters
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d, shown = tl.arange(0, BLOCK_D), token < count
    inside = shown[:, None] & (d < width)[None, :]
    pixels = _pixels(image, token, shown, CHANNELS, PATCH, MERGES, BLOCK_K)
    embedded = tl.where(inside, _embed(pixels, weight, bias, width, K, BLOCK_K, BLOCK_D, DTYPE, PRECISION), 0.0)
    if SAVED:
        centred = embedded - tl.load(statistics + token, mask=shown, other=0.0)[:, None]
        rstd = tl.load(statistics + count + token, mask=shown, other=0.0)
    else:
        mean = tl.sum(embedded, 1) / width
        centred = tl.where(inside, embedded - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
        tl.store(statistics + token, mean, mask=shown)
        tl.store(statistics + count + token, rstd, mask=shown)
    out = centred * rstd[:, None] * _vector(norm_weight, width, BLOCK_D) + _vector(norm_bias, width, BLOCK_D)
    out = cast(tl.where(inside, out, 0.0), y.dtype.element_ty)
    tl.store(y + token[:, None] * width + d[None, :], out, mask=(token < rows)[:, None] & (d < width)[None, :])


@triton.jit
def _structure_embed_backward_kernel(
    dy, image, parameters, statistics, dembedded, sums, count, width, per_program,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, MERGES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Recomputes the embedded patches, and differentiates their norm and the embedding."""
    K: tl.constexpr = CHANNELS * PATCH * PATCH
    weight, bias, norm_weight, _ = parameters
    program = tl.program_id(0).to(tl.int64)
    d, norm_weights = tl.arange(0, BLOCK_D), _vector(norm_weight, width, BLOCK_D)
    # Accumulators have a row per row of the tile: the sum across warps comes once, after the loop.
    sum_norm_weight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_norm_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_weight = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    last = tl.minimum((program + 1) * per_program, count)
    for first in range(program * per_program, last, ROWS):
        token = first + tl.arange(0, ROWS)
        shown = token < last
        inside = shown[:, None] & (d < width)[None, :]
        at = token[:, None] * width + d[None, :]
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        pixels = _pixels(image, token, shown, CHANNELS, PATCH, MERGES, BLOCK_K)
        embedded = _embed(pixels, weight, bias, width, K, BLOCK_K, BLOCK_D, DTYPE, PRECISION)
        mean = tl.load(statistics + token, mask=shown, other=0.0)[:, None]
        rstd = tl.load(statistics + count + token, mask=shown, other=0.0)[:, None]
        xhat = tl.where(inside, (embedded - mean) * rstd, 0.0)
        sum_norm_weight += grad * xhat
        sum_norm_bias += grad
        g = grad * norm_weights
        grad = (g - (tl.sum(g, 1) / width)[:, None] - xhat * (tl.sum(g * xhat, 1) / width)[:, None]) * rstd
        grad = tl.where(inside, grad, 0.0)
        sum_bias += grad
        sum_weight = dot(tl.trans(cast(pixels, DTYPE)), cast(grad, DTYPE), sum_weight, PRECISION)
        if dembedded is not None:
            tl.store(dembedded + at, cast(grad, dembedded.dtype.element_ty), mask=inside)
    dnorm_weight, dnorm_bias, dbias, dweight = sums
    at = program * width + d
    tl.store(dnorm_weight + at, tl.sum(sum_norm_weight, 0), mask=d < width)
    tl.store(dnorm_bias + at, tl.sum(sum_norm_bias, 0), mask=d < width)
    tl.store(dbias + at, tl.sum(sum_bias, 0), mask=d < width)
    k = tl.arange(0, BLOCK_K)
    at = program * width * K + d[None, :] * K + k[:, None]
    tl.store(dweight + at, sum_weight, mask=(d < width)[None, :] & (k < K)[:, None])


def _image(cells: Cells) -> tuple[Any, ...]:
    """Returns the group `image` of the kernels' arguments."""
    structure = cells.structure
    across = structure.shape[3] // cells.cell
    an_image = across * (structure.shape[2] // cells.cell)
    return structure, cells.rows, an_image, across, structure.shape[0] * an_image, *structure.stride()


def _parameters(cells: Cells) -> tuple[Tensor, ...]:
    w = cells.w
    return tuple([vector.contiguous() for vector in (w.embed_weight, w.embed_bias, w.norm_weight, w.norm_bias)])


def _options(cells: Cells) -> dict[str, Any]:
    width, channels, patch, _ = cells.w.embed_weight.shape
    block_d = max(next_power_of_2(width), 16)
    return {
        "CHANNELS": channels,
        "PATCH": patch,
        "MERGES": len(cells.w.merge_weights),
        "ROWS": 16,
        "BLOCK_K": max(next_power_of_2(channels * patch * patch), 16),
        "BLOCK_D": block_d,
        "DTYPE": TYPES[cells.dtype],
        "PRECISION": tf32(),
    }


def embedded(cells: Cells) -> int:
    return min(len(cells.w.merge_weights), 1)


def _patches(cells: Cells, eps: float = 0.0, statistics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the normalised patches, followed by the hidden cell's zeros, and their statistics, which are computed
    with `eps` unless they are given. Cost: 1 launch."""
    device, width, rows = cells.structure.device, cells.w.embed_weight.shape[0], cells.count + cells.per_cell
    options, saved = _options(cells), statistics is not None
    y = torch.empty(rows, width, dtype=cells.dtype, device=device)
    if statistics is None:
        statistics = torch.empty(2, cells.count, dtype=torch.float32, device=device)
    arguments = _image(cells), _parameters(cells), y, statistics, cells.count, rows, width, eps
    # One warp has whole rows, so that no sum crosses warps: the fastest of 8 settings on an H200, unless it spills.
    warps = 1 if options["BLOCK_D"] <= 128 and y.itemsize == 2 else 4 if options["BLOCK_D"] <= 256 else 8
    grid = (cdiv(rows, options["ROWS"]),)
    launch(_structure_embed_forward_kernel, grid, *arguments, SAVED=saved, **options, num_warps=warps)
    return y, statistics


def embed(cells: Cells, weight: Tensor | None, eps: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cost: reads the shown pixels, writes the patches, and with a merging reads them and writes the normalised rows; 1
    launch, and 1 more and the gemm with a merging."""
    patches, statistics = _patches(cells, eps)
    if weight is None:
        return patches, [], [statistics]
    norm = Norm(patches.view(-1, weight.shape[1]), cells.w.merge_norm_weights[0], cells.w.merge_norm_biases[0])
    ((y, merged),) = layer_norms([norm], eps, cells.dtype)
    return gemm.linear(y, weight), [], [statistics, merged]


def embed_backward(
    dx: Tensor,
    cells: Cells,
    weight: Tensor | None,
    inputs: list[Tensor],
    statistics: list[Tensor],
    gradients: Gradients,
) -> Tensor | None:
    """Cost: writes the patches again and reads their gradient; 1 launch, and 2 more and the gemms with a merging."""
    if weight is not None:
        rows = _patches(cells, statistics=statistics[0])[0].view(-1, weight.shape[1])
        vectors = cells.w.merge_norm_weights[0], cells.w.merge_norm_biases[0]
        (norm,) = layer_norms_backward([NormGradient(gemm.dgrad(dx, weight), rows, statistics[1], *vectors)])
        gradients.weight("merge_weights[0]", dx, norm.y)
        gradients.norm("merge_norm_weights[0]", "merge_norm_biases[0]", norm)
        dx = norm.dx
    options, device, parameters, width = _options(cells), dx.device, _parameters(cells), cells.w.embed_weight.shape[0]
    warps = 4 if options["BLOCK_D"] <= 128 else 8 if options["BLOCK_D"] <= 256 else 16
    tiles = cdiv(cdiv(cells.count, options["ROWS"]), WARPS // warps * target(device).multiprocessors)
    per_program = max(tiles, 1) * options["ROWS"]
    programs, names = cdiv(cells.count, per_program), ("norm_weight", "norm_bias", "embed_bias", "embed_weight")
    sums = {
        name: torch.empty(programs, parameter.numel(), dtype=torch.float32, device=device)
        for name, parameter in zip(names, (*parameters[2:], *parameters[1::-1]), strict=True)
    }
    dembedded = None
    if "structure" in gradients:
        dembedded = torch.empty(cells.count, width, dtype=dx.dtype, device=device)
    results = dembedded, tuple(sums.values())
    arguments = dx, _image(cells), parameters, statistics[0], *results, cells.count, width, per_program
    launch(_structure_embed_backward_kernel, (programs,), *arguments, **options, num_warps=warps)
    gradients.sums(sums)
    if dembedded is None:
        return None
    (embed_weight,) = weights_in(cells.dtype, cells.w.embed_weight)
    return gemm.dgrad(dembedded, embed_weight.flatten(1))

"""`gather_patches` in Triton: gathers cells of an NCHW tensor into packed rows, and back. One element per thread."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import inside_of
from sgmim_fast.kernels.launch import cdiv, launch, on_device

_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_BLOCK = 1024


@triton.jit
def _kernel(
    pixels, rows, packed, elements, width, across, cells, all_cells, sb, sc, sh, sw,
    SIDE: tl.constexpr, LEVELS: tl.constexpr, PATCH: tl.constexpr, ZORDER: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    patch, k = at // width, at % width
    t = patch % (SIDE * SIDE)
    if ZORDER:
        y, x = 0 * t, 0 * t
        for level in tl.static_range(LEVELS):  # at each level the row's bit is below the column's
            y += (t >> (2 * level) & 1) << level
            x += (t >> (2 * level + 1) & 1) << level
    else:
        y, x = t // SIDE, t % SIDE
    cell = inside_of(tl.load(rows + patch // (SIDE * SIDE), mask=inside, other=0), all_cells)
    y = (cell % cells // across * SIDE + y) * PATCH + k % (PATCH * PATCH) // PATCH
    x = (cell % across * SIDE + x) * PATCH + k % PATCH
    place = cell // cells * sb + k // (PATCH * PATCH) * sc + y * sh + x * sw
    if BACKWARD:
        tl.store(pixels + place, tl.load(packed + at, mask=inside), mask=inside)
    else:
        tl.store(packed + at, tl.load(pixels + place, mask=inside), mask=inside)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    dtype = args[0].dtype
    return dtype in _DTYPES, f"dtype {dtype}; the Triton kernel takes {', '.join(str(d)[6:] for d in _DTYPES)}"


def _run(pixels: Tensor, rows: Tensor, packed: Tensor, cell: int, patch: int, zorder: bool, backward: bool) -> None:
    side, across = cell // patch, pixels.shape[3] // cell
    launch(
        _kernel,
        (cdiv(packed.numel(), _BLOCK),),
        pixels,
        rows.contiguous(),
        packed,
        packed.numel(),
        packed.shape[1],
        across,
        across * (pixels.shape[2] // cell),
        pixels.shape[0] * across * (pixels.shape[2] // cell),
        *pixels.stride(),
        SIDE=side,
        LEVELS=side.bit_length() - 1,
        PATCH=patch,
        ZORDER=zorder,
        BACKWARD=backward,
        BLOCK=_BLOCK,
    )


@on_device
def forward(pixels: Tensor, rows: Tensor, cell: int, patch: int, zorder: bool) -> Tensor:
    """Cost: reads and writes the selected pixels once; 1 launch."""
    side = cell // patch
    shape = rows.shape[0] * side * side, pixels.shape[1] * patch * patch
    packed = torch.empty(shape, dtype=pixels.dtype, device=pixels.device)
    _run(pixels, rows, packed, cell, patch, zorder, False)
    return packed


@on_device
def backward(grad: Tensor, rows: Tensor, shape: list[int], cell: int, patch: int, zorder: bool) -> Tensor:
    """Cost: fills the map, then reads and writes the selected pixels once; 1 launch and a fill. Rows are distinct."""
    pixels = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    _run(pixels, rows, grad.contiguous(), cell, patch, zorder, True)
    return pixels

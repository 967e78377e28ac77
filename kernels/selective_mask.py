"""`selective_mask` in Triton: draw, selection and row lists in one launch, with one program per image.

The count-th smallest key is found by bisection over its 32 bits, 32 counts over keys in registers. Of equal keys those
of the first units are taken, as by a stable sort. Row lists are compacted by prefix sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.launch import MOST_COLUMNS, launch, next_power_of_2, on_device
from sgmim_fast.ops.selective_mask import counts, offsets, sizes


@triton.jit
def _keys(seed, image, unit):
    """Philox 4x32-10 with counter (unit // 4, image, 0, 0): the word unit % 4."""
    zero = 0 * unit
    low = (zero + tl.load(seed)).to(tl.uint32)
    high = (zero + tl.load(seed + 1)).to(tl.uint32)
    fours, images, zero = (unit // 4).to(tl.uint32), (zero + image).to(tl.uint32), zero.to(tl.uint32)
    a, b, c, d = tl.philox_impl(fours, images, zero, zero, low, high)
    word = unit % 4
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))


@triton.jit
def _kernel(
    seed, mask, drawn, visible, visible_offsets, masked_rows, masked_offsets, counts, count, gh, gw, scale,
    UNITS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    units = gh * gw
    cells = units * scale * scale
    if counts is None:
        masked_begin = image.to(tl.int64) * count * scale * scale
        visible_begin = image.to(tl.int64) * cells - masked_begin
        tl.store(masked_offsets + image + 1, masked_begin + count * scale * scale)
        tl.store(visible_offsets + image + 1, visible_begin + cells - count * scale * scale)
        if image == 0:
            tl.store(masked_offsets, masked_begin)
            tl.store(visible_offsets, visible_begin)
    else:
        count = tl.load(counts + image).to(tl.int32)
        masked_begin = tl.load(masked_offsets + image)
        visible_begin = tl.load(visible_offsets + image)

    unit = tl.arange(0, UNITS)
    key = _keys(seed, image, unit)
    there = unit < units
    threshold = tl.zeros([], tl.uint32)  # the largest number with fewer than `count` keys below it: the count-th key
    for bit in tl.static_range(32):
        higher = threshold | tl.full([], 1 << (31 - bit), tl.uint32)
        below = tl.sum((there & (key < higher)).to(tl.int32), 0)
        threshold = tl.where(below < count, higher, threshold)
    below = tl.sum((there & (key < threshold)).to(tl.int32), 0)
    equal = there & (key == threshold)
    nth = tl.cumsum(equal.to(tl.int32), 0)
    chosen = there & (count > 0) & ((key < threshold) | (equal & (nth <= count - below)))
    drawn += image.to(tl.int64) * units
    tl.store(drawn + unit, chosen.to(tl.int8), mask=there)
    tl.debug_barrier()  # other threads of this program read `drawn`

    width = gw * scale
    for start in range(0, cells, CELLS):
        cell = start + tl.arange(0, CELLS)
        in_grid = cell < cells
        masked = tl.load(drawn + cell // width // scale * gw + cell % width // scale, mask=in_grid, other=0) != 0
        row = image.to(tl.int64) * cells + cell
        tl.store(mask + row, masked.to(tl.int8), mask=in_grid)
        found = tl.cumsum((in_grid & masked).to(tl.int32), 0)
        tl.store(masked_rows + masked_begin + found - 1, row, mask=in_grid & masked)
        left = tl.cumsum((in_grid & ~masked).to(tl.int32), 0)
        tl.store(visible + visible_begin + left - 1, row, mask=in_grid & ~masked)
        masked_begin += tl.max(found, 0)
        visible_begin += tl.max(left, 0)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    units = args[2] * args[3]
    return units <= MOST_COLUMNS, f"{units} units per image; the Triton kernel holds {MOST_COLUMNS} in registers"


@on_device
def forward(
    seed: Tensor, masked: Sequence[int], gh: int, gw: int, scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cost: writes mask, rows and offsets; 1 launch if all images have equally many masked units, else 5 more."""
    batch, device, units = len(masked), seed.device, gh * gw
    shape, visible, masked_rows = sizes(masked, gh, gw, scale)
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    drawn = torch.empty(batch, units, dtype=torch.int8, device=device)
    rows = [torch.empty(n, dtype=torch.int64, device=device) for n in (visible, masked_rows)]
    same = len(set(masked)) == 1
    number = None if same else counts(masked, device)
    starts = [torch.empty(batch + 1, dtype=torch.int64, device=device) for _ in rows]
    if not same:
        starts = [offsets(n, scale) for n in (units - number, number)]
    launch(
        _kernel,
        (batch,),
        seed.contiguous(),
        mask.view(torch.int8),
        drawn,
        rows[0],
        starts[0],
        rows[1],
        starts[1],
        number,
        masked[0],
        gh,
        gw,
        scale,
        UNITS=max(next_power_of_2(units), 2),
        CELLS=min(max(next_power_of_2(units * scale * scale), 2), 4096),
    )
    return mask, rows[0], starts[0], rows[1], starts[1]

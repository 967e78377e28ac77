"""Sums over rows in two stages of fixed order: partial sums per program, then one launch for all sums of an op.

There are no atomics: the same number of programs yields the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import cast
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2, programs_of_rows

COLUMNS_TILE = 1 << 12  # numbers that a program of `column_sums` loads at a time
FINISHED = 1 << 13  # numbers that a program of `finish` loads at a time: enough to hide the latency
WIDE = 1 << 14  # width of sums that have a launch of their own
MOST_ADDED = 32  # values that an accumulator adds in sequence, which bounds its rounding error


class Sum(NamedTuple):
    """A sum to finish: `partials` (programs, n), contiguous, into `out` (n,) of any floating-point dtype."""

    partials: Tensor
    out: Tensor


@triton.jit
def _finish_kernel(partials, outs, scale, factor, counts, widths, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    job = tl.program_id(1)
    partial = partials[0]
    out = outs[0]
    count = counts[0]
    width = widths[0]
    for i in tl.static_range(1, len(partials)):
        if job == i:
            partial = partials[i]
            out = outs[i]
            count = counts[i]
            width = widths[i]
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.where(tl.program_id(0) * BLOCK < width, count, 0)  # the grid covers the widest sum
    parts = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        parts += tl.load(partial + at, mask=inside, other=0.0)
    total = tl.sum(parts, 0)
    if scale is not None:
        total *= tl.load(scale)
    total *= factor
    tl.store(out + column, cast(total, out.dtype.element_ty), mask=column < width)


def finish(sums: list[Sum], scale: Tensor | None = None, factor: float = 1.0) -> None:
    """Adds the partial sums of every sum, and multiplies by `scale` (a tensor of one number) and `factor`.

    Cost: reads the partials once; 1 launch for each dtype of the outs (one if all norms and biases of a model share a
    dtype), 1 more for wide sums (an attention's bias), whose tiles have another shape, and 1 more if some sums have
    over a thousand parts, too many for one program.
    """
    long = [s.partials.shape[0] > 1024 and s.out.numel() > 1 for s in sums]
    if any(long):
        first = [s for s, many in zip(sums, long, strict=True) if many]
        sums = [s for s, many in zip(sums, long, strict=True) if not many]
        sums += map(Sum, column_sums([s.partials for s in first]), [s.out for s in first])
    launches: dict[tuple[torch.dtype, bool], list[Sum]] = {}
    for s in sums:
        launches.setdefault((s.out.dtype, s.out.numel() > WIDE), []).append(s)
    for group in launches.values():
        _finish(group, scale, float(factor))


def finished(sums: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Returns the totals of partial sums (programs, n), each in its own tensor (n,). Cost: see `finish`."""
    outs = [torch.empty(p.shape[1], dtype=dtype, device=p.device) for p, dtype in zip(sums, dtypes, strict=True)]
    finish([Sum(*pair) for pair in zip(sums, outs, strict=True)])
    return outs


def _finish(sums: list[Sum], scale: Tensor | None, factor: float) -> None:
    partials, outs = (tuple(t) for t in zip(*sums, strict=True))
    rows = max(8, min(next_power_of_2(max(p.shape[0] for p in partials)), FINISHED // 32))
    block = FINISHED // rows if max(out.numel() for out in outs) > 1 else 1
    launch(
        _finish_kernel,
        (cdiv(max(out.numel() for out in outs), block), len(outs)),
        partials,
        outs,
        scale,
        factor,
        tuple(p.shape[0] for p in partials),
        tuple(out.numel() for out in outs),
        BLOCK=block,
        ROWS=rows if block > 1 else 1024,
        num_warps=8,
    )


@triton.jit
def _columns_kernel(xs, partials, keep, counts, widths, per_program, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    job = tl.program_id(2)
    x = xs[0]
    partial = partials[0]
    count = counts[0]
    width = widths[0]
    for i in tl.static_range(1, len(xs)):
        if job == i:
            x = xs[i]
            partial = partials[i]
            count = counts[i]
            width = widths[i]
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum((program + 1) * per_program, count)
    for first in range(program * per_program, last, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        if keep is not None:
            inside = inside & (tl.load(keep + row, mask=row < last, other=0)[:, None] > 0)
        total += tl.load(x + at, mask=inside, other=0).to(tl.float32)
    here = (column < width) & (0 * column + program * per_program < count)
    tl.store(partial + program.to(tl.int64) * width + column, tl.sum(total, 0), mask=here)


def column_sums(xs: Sequence[Tensor], keep: Tensor | None = None) -> list[Tensor]:
    """Returns partial sums over the rows of each (n, C) tensor of one dtype, (programs, C). keep: (n,), 0 excludes a
    row.

    Cost: reads the tensors once; 1 launch.
    """
    rows, widest = max(x.shape[0] for x in xs), max(x.shape[1] for x in xs)
    block = min(next_power_of_2(widest), 1024)  # the fastest of 10 tiles measured on an H200
    tile = COLUMNS_TILE // block
    per_program, _ = programs_of_rows(rows, widest, xs[0].device, most=tile * MOST_ADDED, columns=block)
    counts = [cdiv(x.shape[0], per_program) for x in xs]
    partials = [x.new_empty(count, x.shape[1], dtype=torch.float32) for x, count in zip(xs, counts, strict=True)]
    launch(
        _columns_kernel,
        (cdiv(widest, block), max(counts), len(xs)),
        tuple(xs),
        tuple(partials),
        keep,
        tuple(x.shape[0] for x in xs),
        tuple(x.shape[1] for x in xs),
        per_program,
        ROWS=tile,
        BLOCK=block,
    )
    return partials

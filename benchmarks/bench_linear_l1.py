"""`linear_l1`, head and L1 loss of selected cells, against all cells: pytest benchmarks/bench_linear_l1.py"""

from __future__ import annotations

import functools

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare
from tools.shapes import SHAPES
from torch.nn import functional as F

from sgmim_fast import reference, selective_mask
from sgmim_fast.ops import cases, gather_patches

CHANNELS = {"image": 3, "structure": 1}  # head -> channels of its target


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("head", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_linear_l1(benchmark, name, dtype, head, encoder):
    """Forward and backward. The image head reads the masked cells, the structure head the visible ones."""
    torch.manual_seed(0)
    shape, channels = SHAPES[encoder], CHANNELS[head]
    grid = (shape.image // shape.stride,) * 2
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    rows = (drawn.on(grid).masked if head == "image" else drawn.on(grid).visible).index
    counts = [len(rows) // BATCH] * BATCH
    options = {"packed": False, "decided": True, "rows": rows}
    a = cases.linear_l1(counts, grid, channels, shape.stride, shape.width, **options)
    counted = reference.pixel_mask(drawn.mask if head == "image" else ~drawn.mask, a.target)

    def dense(a):
        x, layer = a.x.view(BATCH, shape.cells, -1), functools.partial(F.linear, weight=a.weight, bias=a.bias)
        return (counted * (reference.predict(x, layer, a.target, a.cell) - a.target).abs()).sum()

    def visible(a):
        target = gather_patches(a.target, rows, cell=a.cell, patch=a.cell)
        return (F.linear(a.x[rows], a.weight, a.bias) - target).abs().sum()

    compare(benchmark, "linear_l1", name, f"{encoder} {head} head", dtype, a, dense=dense, visible=visible)

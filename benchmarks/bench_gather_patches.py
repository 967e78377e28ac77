"""`gather_patches` of the shown cells against unfolding everything: pytest benchmarks/bench_gather_patches.py"""

from __future__ import annotations

import pytest
import torch
from tools.op_bench import BATCH, compare
from tools.shapes import SHAPES

from sgmim_fast import selective_mask
from sgmim_fast.ops import cases
from sgmim_fast.ops.gather_patches import patch_order

# name -> (channels, Z-order) of what the model gathers: patches of the structure map, in Z-order, and cells of the loss
CASES = {"structure": (1, True), "pixels": (3, False)}


def plain(a):
    """Plain PyTorch: unfolds all cells, then selects those in `rows`."""
    (batch, channels, height, width), cell, patch = a.pixels.shape, a.cell, a.patch
    side = cell // patch
    cells = a.pixels.view(batch, channels, height // cell, side, patch, width // cell, side, patch)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, side * side, channels * patch * patch)[a.rows]
    if a.zorder:
        cells = cells[:, patch_order(side, True)]
    return cells.reshape(-1, channels * patch * patch)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_gather_patches(benchmark, name, backward, case, encoder):
    torch.manual_seed(0)
    shape, (channels, zorder) = SHAPES[encoder], CASES[case]
    cell, grid = shape.stride, (shape.image // shape.stride,) * 2
    rows = selective_mask(BATCH, shape.grid, scale=shape.unit // cell).masked.index
    patch = 4 if case == "structure" else cell
    a = cases.gather_patches([shape.masked] * BATCH, grid, channels, cell, patch, zorder=zorder, rows=rows)
    compare(benchmark, "gather_patches", name, f"{encoder} {case}", "float32", a, backward, plain=plain)

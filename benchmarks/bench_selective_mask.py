"""`selective_mask` against a loop of `torch.randperm`: pytest benchmarks/bench_selective_mask.py"""

from __future__ import annotations

import math

import pytest
import torch
from tools.shapes import SHAPES
from torch import Tensor

from sgmim_fast import backends, selective_mask

BATCH = 128


def randperm(grid: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: returns the mask and the visible and masked rows."""
    mask = torch.zeros(BATCH, grid * grid, dtype=torch.bool)
    for image in mask:
        image[torch.randperm(grid * grid)[:count]] = True
    flat = mask.flatten()
    return mask.view(BATCH, grid, grid), (~flat).nonzero().flatten(), flat.nonzero().flatten()


@pytest.mark.parametrize("grid", [*sorted({shape.grid for shape in SHAPES.values()}), 64])
@pytest.mark.parametrize("name", ["randperm", "torch", "cpu"])
def test_selective_mask(benchmark, name, grid):
    count = math.ceil(0.6 * grid * grid)
    benchmark.group = f"{BATCH} x {grid}^2 units"
    if name == "randperm":
        benchmark(randperm, grid, count)
        return
    if not (usable := backends.can_run("selective_mask", name))[0]:
        pytest.skip(usable[1])
    with backends.use(name):
        drawn = selective_mask(BATCH, grid)
        assert (drawn.mask.flatten(1).sum(1) == count).all()
        assert torch.equal(drawn.masked.index, drawn.mask.flatten().nonzero().flatten())
        benchmark(selective_mask, BATCH, grid)

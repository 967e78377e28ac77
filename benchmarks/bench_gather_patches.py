"""`gather_patches` of the shown cells against unfolding everything: pytest benchmarks/bench_gather_patches.py"""

from __future__ import annotations

import pytest
import torch
from tools.shapes import SHAPES
from torch import Tensor

from sgmim_fast import backends, selective_mask
from sgmim_fast.ops import gather_patches
from sgmim_fast.ops.gather_patches import patch_order

BATCH = 16
# what the model gathers: the structure's embedded patches, in Z-order, and the cells of the loss
CASES = {"structure": (1, "z"), "pixels": (3, "raster")}


def plain(pixels: Tensor, rows: Tensor, cell: int, patch: int, order: str) -> Tensor:
    """Plain PyTorch: all cells, then the wanted ones."""
    batch, channels, height, width = pixels.shape
    side = cell // patch
    cells = pixels.view(batch, channels, height // cell, side, patch, width // cell, side, patch)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, side * side, channels * patch * patch)[rows]
    if order == "z":
        cells = cells[:, patch_order(side, True)]
    return cells.reshape(-1, channels * patch * patch)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_gather_patches(benchmark, name, backward, case, encoder):
    torch.manual_seed(0)
    shape, (channels, order) = SHAPES[encoder], CASES[case]
    cell = shape.stride
    patch = 4 if case == "structure" else cell
    pixels = torch.randn(BATCH, channels, shape.image, shape.image, requires_grad=backward)
    rows = selective_mask(BATCH, shape.grid, scale=shape.unit // cell).masked.index

    def gathered(pixels):
        return gather_patches(pixels, rows, cell=cell, patch=patch, order=order)

    def unfolded(pixels):
        return plain(pixels, rows, cell, patch, order)

    def run(function):
        packed = function(pixels)
        return torch.autograd.grad(packed, pixels, packed.detach())[0] if backward else packed

    benchmark.group = f"{encoder} {case}, {'forward and backward' if backward else 'forward'}, B = {BATCH}"
    if name == "plain":
        benchmark(run, unfolded)
        return
    if not (usable := backends.can_run("gather_patches", name))[0]:
        pytest.skip(usable[1])
    with backends.use(name):
        assert torch.equal(run(gathered), run(unfolded))
        benchmark(run, gathered)

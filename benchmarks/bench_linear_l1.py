"""`linear_l1`, head and L1 on the wanted cells, against doing it densely: pytest benchmarks/bench_linear_l1.py"""

from __future__ import annotations

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare, forward_backward
from tools.shapes import SHAPES
from torch import nn

from sgmim_fast import reference, selective_mask
from sgmim_fast.ops import gather_patches, linear_l1

CHANNELS = {"image": 3, "structure": 1}  # the two heads


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("head", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_linear_l1(benchmark, name, dtype, head, encoder):
    """Forward and backward. The image head reads the masked cells, the structure head the visible ones."""
    torch.manual_seed(0)
    shape, channels = SHAPES[encoder], CHANNELS[head]
    side = shape.image // shape.stride
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    rows = (drawn.on((side, side)).masked if head == "image" else drawn.on((side, side)).visible).index
    linear = nn.Linear(shape.width, channels * shape.stride**2)
    x = torch.randn(BATCH * shape.cells, shape.width, requires_grad=True)
    # away from zero, so that no sign hangs on a rounding error
    target = torch.randn(BATCH, channels, shape.image, shape.image)
    target = target + torch.where(target < 0, -4, 4)
    wanted = drawn.mask if head == "image" else ~drawn.mask
    counted = reference.pixel_mask(wanted, target)

    def dense():
        prediction = reference.predict(x.view(BATCH, shape.cells, -1), linear, target, shape.stride)
        return (counted * (prediction - target).abs()).sum()

    def visible():
        return (linear(x[rows]) - gather_patches(target, rows, cell=shape.stride, patch=shape.stride)).abs().sum()

    def fused():
        return linear_l1(x, linear.weight, linear.bias, target, rows, cell=shape.stride, packed=False)

    run = forward_backward(DTYPES[dtype], [x, linear.weight, linear.bias])
    group = f"{encoder} {head} head, {dtype}"
    compare(benchmark, "linear_l1", name, group, DTYPES[dtype], run, fused, dense=dense, visible=visible)

"""`linear_l1`, head and L1 on the wanted cells, against doing it densely: pytest benchmarks/bench_linear_l1.py"""

from __future__ import annotations

import pytest
import torch
from tools.agree import assert_agree
from tools.shapes import SHAPES
from torch import nn

from sgmim_fast import backends, reference, selective_mask
from sgmim_fast.ops import gather_patches, linear_l1

BATCH = 16
CHANNELS = {"image": 3, "structure": 1}  # the two heads
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("head", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", "torch", "cpu"])
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

    def run(function, dtype=DTYPES[dtype]):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = function()
        return [loss.detach(), *torch.autograd.grad(loss, [x, linear.weight, linear.bias])]

    benchmark.group = f"linear_l1 {encoder} {head} head, {dtype}, B = {BATCH}"
    if name in ("dense", "visible"):
        benchmark(run, dense if name == "dense" else visible)
        return
    if not (usable := backends.can_run("linear_l1", name))[0]:
        pytest.skip(usable[1])
    with backends.use(name):
        assert_agree(run(fused), run(dense), run(dense, torch.float32))
        benchmark(run, fused)

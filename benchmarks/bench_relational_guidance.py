"""`relational_guidance` of the visible cells against all cells: pytest benchmarks/bench_relational_guidance.py"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare, forward_backward
from tools.shapes import SHAPES
from tools.visible import guide

from sgmim_fast import selective_mask
from sgmim_fast.guidance import RelationalGuidance
from sgmim_fast.masking import resize


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_relational_guidance(benchmark, name, dtype, encoder):
    """Forward and backward, to features, structure tokens and parameters."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side = shape.image // shape.stride
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    cells = drawn.on((side, side))
    visible_cells, shown = cells.visible.index, cells.shown.index
    module = RelationalGuidance(shape.width, shape.heads)
    features = torch.randn(BATCH * shape.cells, shape.width, requires_grad=True)
    structure = torch.randn(shown.shape[0] + 1, shape.width, requires_grad=True)  # the last row is the hidden cells'
    place = torch.full((BATCH * shape.cells,), shown.shape[0]).index_copy_(0, shown, torch.arange(shown.shape[0]))
    cotangent = torch.randn(visible_cells.shape[0], shape.width)

    def dense():
        x, context = (t.view(BATCH, shape.cells, -1) for t in (features, structure[place]))
        guided = module(x, context, resize(drawn.mask, side, side).flatten(1))
        return guided.flatten(0, 1)[visible_cells]

    def visible():
        last = structure[-1].expand(BATCH, 1, -1)
        context = torch.cat([structure[:-1].view(BATCH, -1, shape.width), last], 1)
        x = features[visible_cells].view(BATCH, -1, shape.width)
        return guide(SimpleNamespace(guidance=module), x, context, shape.visible).flatten(0, 1)

    def fused():
        return module.visible(features, structure, cells.visible, cells.shown)

    run = forward_backward(DTYPES[dtype], [features, structure, *module.parameters()], cotangent)
    group = f"{encoder}, {dtype}"
    compare(benchmark, "relational_guidance", name, group, DTYPES[dtype], run, fused, dense=dense, visible=visible)

"""`relational_guidance` of the visible cells against all cells: pytest benchmarks/bench_relational_guidance.py"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare
from tools.shapes import SHAPES
from tools.visible import guide

from sgmim_fast import selective_mask
from sgmim_fast.guidance import RelationalGuidance
from sgmim_fast.masking import resize
from sgmim_fast.ops import cases


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_relational_guidance(benchmark, name, dtype, encoder):
    """Forward and backward, with gradients of features, structure tokens and parameters."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side = shape.image // shape.stride
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    cells = drawn.on((side, side))
    seen, shown = cells.visible.index, cells.shown.index
    module = RelationalGuidance(shape.width, shape.heads)
    sizes = [shape.visible] * BATCH, None, shape.cells, shape.width, shape.heads
    a = cases.relational_guidance(*sizes, rows=(cells.visible, cells.shown))
    a = a._replace(parameters=module.parameters_for_op())
    # position of each cell's token in a.structure, whose last row is the token of all hidden cells
    place = torch.full((BATCH * shape.cells,), len(shown)).index_copy_(0, shown, torch.arange(len(shown)))

    def dense(a):
        x, context = (t.view(BATCH, shape.cells, -1) for t in (a.features, a.structure[place]))
        guided = module(x, context, resize(drawn.mask, side, side).flatten(1))
        return guided.flatten(0, 1)[seen]

    def visible(a):
        last = a.structure[-1].expand(BATCH, 1, -1)
        context = torch.cat([a.structure[:-1].view(BATCH, -1, shape.width), last], 1)
        x = a.features[seen].view(BATCH, -1, shape.width)
        return guide(SimpleNamespace(guidance=module), x, context, shape.visible).flatten(0, 1)

    compare(benchmark, "relational_guidance", name, encoder, dtype, a, dense=dense, visible=visible)

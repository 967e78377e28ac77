"""`structure_embed` of the shown cells against the whole map: pytest benchmarks/bench_structure_embed.py"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare
from tools.shapes import SHAPES
from tools.visible import structure_tokens

from sgmim_fast import selective_mask
from sgmim_fast.guidance import StructureEncoder, embedding_patch
from sgmim_fast.masking import resize
from sgmim_fast.ops import cases


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_structure_embed(benchmark, name, dtype, encoder):
    """Forward and backward, with gradients of the parameters."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side = shape.image // shape.stride
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    shown = drawn.on((side, side)).shown
    hidden = (~resize(drawn.mask, side, side)).flatten().nonzero()[0]  # one suffices, since all have the same token
    stem = resize(drawn.mask, shape.image // shape.patch, shape.image // shape.patch)
    module = StructureEncoder(1, shape.width, shape.stride)
    patch, mergings = embedding_patch(shape.stride)
    sizes = [shape.masked] * BATCH, (side, side), 1, patch, mergings, shape.width >> mergings
    a = cases.structure_embed(*sizes, rows=shown.index)._replace(parameters=module.parameters_for_op().flat())

    def dense(a):
        tokens = module(a.structure, stem).flatten(0, 1)
        return tokens[torch.cat([a.rows, hidden])]

    def visible(a):
        masked = a.rows.view(BATCH, -1) - torch.arange(BATCH)[:, None] * shape.cells
        tokens = structure_tokens(SimpleNamespace(structure_encoder=module), a.structure, masked)
        return torch.cat([tokens[:, :-1].flatten(0, 1), tokens[:1, -1]])

    compare(benchmark, "structure_embed", name, encoder, dtype, a, dense=dense, visible=visible)

"""`structure_embed` of the shown cells against the whole map: pytest benchmarks/bench_structure_embed.py"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare, forward_backward
from tools.shapes import SHAPES
from tools.visible import structure_tokens

from sgmim_fast import selective_mask
from sgmim_fast.guidance import StructureEncoder
from sgmim_fast.masking import resize


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_structure_embed(benchmark, name, dtype, encoder):
    """Forward and backward, to the parameters."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side = shape.image // shape.stride
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    shown = drawn.on((side, side)).shown
    hidden = (~resize(drawn.mask, side, side)).flatten().nonzero()[0]  # any one; all are the same
    stem = resize(drawn.mask, shape.image // shape.patch, shape.image // shape.patch)
    module = StructureEncoder(1, shape.width, shape.stride)
    structure = torch.randn(BATCH, 1, shape.image, shape.image)
    cotangent = torch.randn(shown.index.shape[0] + 1, shape.width)

    def dense():
        tokens = module(structure, stem).flatten(0, 1)
        return tokens[torch.cat([shown.index, hidden])]

    def visible():
        masked = shown.index.view(BATCH, -1) - torch.arange(BATCH)[:, None] * shape.cells
        tokens = structure_tokens(SimpleNamespace(structure_encoder=module), structure, masked)
        return torch.cat([tokens[:, :-1].flatten(0, 1), tokens[:1, -1]])

    def fused():
        return module.visible(structure, shown)

    run = forward_backward(DTYPES[dtype], list(module.parameters()), cotangent)
    group = f"{encoder}, {dtype}"
    compare(benchmark, "structure_embed", name, group, DTYPES[dtype], run, fused, dense=dense, visible=visible)

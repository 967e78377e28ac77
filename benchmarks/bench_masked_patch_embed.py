"""`masked_patch_embed` against embedding every patch: pytest benchmarks/bench_masked_patch_embed.py"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tools.op_bench import BACKENDS, BATCH, compare
from tools.shapes import SHAPES

from sgmim_fast import selective_mask
from sgmim_fast.ops import cases


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", ["dense", *BACKENDS])
def test_masked_patch_embed(benchmark, name, backward, encoder):
    torch.manual_seed(0)
    shape, normed = SHAPES[encoder], encoder != "vit_base"
    grid, drawn = (shape.image // shape.patch,) * 2, selective_mask(BATCH, shape.grid, scale=shape.unit // shape.patch)
    options = {"norm": normed, "visible": drawn.visible.index}
    a = cases.masked_patch_embed(BATCH, grid, 3, shape.patch, shape.stem, **options)
    masked = drawn.mask.flatten(1)[..., None].float()

    def dense(a):
        tokens = F.conv2d(a.x, a.weight, a.bias, stride=shape.patch).flatten(2).mT
        if normed:
            tokens = F.layer_norm(tokens, tokens.shape[2:], a.norm_weight, a.norm_bias)
        return tokens * (1 - masked) + a.mask_token * masked

    compare(benchmark, "masked_patch_embed", name, encoder, "float32", a, backward, dense=dense)

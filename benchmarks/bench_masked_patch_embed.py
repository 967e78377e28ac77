"""`masked_patch_embed` against embedding every patch: pytest benchmarks/bench_masked_patch_embed.py"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tools.shapes import SHAPES

from sgmim_fast import backends, selective_mask
from sgmim_fast.ops.masked_patch_embed import masked_patch_embed

BATCH = 16
WIDTHS = {"swin_base": 128, "vit_base": 768}  # of the stem


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", ["dense", "torch", "cpu"])
def test_masked_patch_embed(benchmark, name, backward, encoder):
    torch.manual_seed(0)
    shape, width = SHAPES[encoder], WIDTHS[encoder]
    p = shape.patch
    x = torch.randn(BATCH, 3, shape.image, shape.image)
    vectors = [torch.randn(width) for _ in range(4)]
    leaves = [torch.randn(width, 3, p, p) / p, *vectors]
    if encoder != "swin_base":
        leaves = leaves[:3]  # no norm
    leaves = [leaf.requires_grad_(backward) for leaf in leaves]
    drawn = selective_mask(BATCH, shape.grid, scale=shape.unit // p)
    mask, visible = drawn.mask.flatten(1), drawn.visible.index
    weights = mask[..., None].float()

    def dense(weight, bias, token, *norm):
        tokens = F.conv2d(x, weight, bias, stride=p).flatten(2).mT
        if norm:
            tokens = F.layer_norm(tokens, (width,), *norm)
        return tokens * (1 - weights) + token * weights

    def fused(weight, bias, token, norm_weight=None, norm_bias=None):
        return masked_patch_embed(x, weight, bias, token, visible, norm_weight=norm_weight, norm_bias=norm_bias)

    def run(function):
        tokens = function(*leaves)
        return [tokens, *torch.autograd.grad(tokens, leaves, tokens.detach())] if backward else [tokens]

    benchmark.group = f"{encoder}, {'forward and backward' if backward else 'forward'}, B = {BATCH}"
    if name == "dense":
        benchmark(run, dense)
        return
    if not (usable := backends.can_run("masked_patch_embed", name))[0]:
        pytest.skip(usable[1])
    with backends.use(name):
        for actual, expected in zip(run(fused), run(dense), strict=True):
            assert (actual - expected).norm() <= 1e-5 * expected.norm()
        benchmark(run, fused)

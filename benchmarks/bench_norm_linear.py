"""`norm_linear` against LayerNorm, linear and addition, as a block has them: pytest benchmarks/bench_norm_linear.py"""

from __future__ import annotations

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare, forward_backward
from tools.shapes import SHAPES
from torch import nn

from sgmim_fast.ops import norm_linear


@pytest.mark.parametrize("encoder", ["swin_base", "vit_base"])
@pytest.mark.parametrize("layer", ["norm and qkv", "projection and residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_norm_linear(benchmark, name, dtype, layer, encoder):
    """Forward and backward, in the encoder's deepest stage."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side, width = shape.deepest
    tokens = BATCH, side**2 + shape.prefix
    normed = layer == "norm and qkv"
    norm, linear = nn.LayerNorm(width), nn.Linear(width, 3 * width if normed else width)
    x, residual = (torch.randn(*tokens, width, requires_grad=True) for _ in range(2))
    cotangent = torch.randn(*tokens, linear.out_features)
    leaves = [x, *linear.parameters(), *(norm.parameters() if normed else [residual])]

    def plain():
        return linear(norm(x)) if normed else residual + linear(x)

    def fused():
        if normed:
            return norm_linear(x, linear.weight, linear.bias, norm_weight=norm.weight, norm_bias=norm.bias)
        return norm_linear(x, linear.weight, linear.bias, residual=residual)

    run = forward_backward(DTYPES[dtype], leaves, cotangent)
    group = f"{encoder} {layer}, {dtype}"
    compare(benchmark, "norm_linear", name, group, DTYPES[dtype], run, fused, plain=plain)

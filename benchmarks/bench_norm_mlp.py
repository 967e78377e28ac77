"""`norm_mlp` against timm's norm, MLP and residual: pytest benchmarks/bench_norm_mlp.py"""

from __future__ import annotations

import pytest
import torch
from timm.layers import Mlp
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare, forward_backward
from tools.shapes import SHAPES
from torch import nn

from sgmim_fast.ops import norm_mlp


@pytest.mark.parametrize("encoder", ["swin_base", "vit_base"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_norm_mlp(benchmark, name, dtype, residual, encoder):
    """Forward and backward, in the encoder's deepest stage."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side, width = shape.deepest
    norm, mlp = nn.LayerNorm(width), Mlp(width, 4 * width)
    x = torch.randn(BATCH, side**2 + shape.prefix, width, requires_grad=True)
    cotangent = torch.randn_like(x)
    layers, vectors = list(mlp.parameters()), {"norm_weight": norm.weight, "norm_bias": norm.bias}

    def plain():
        return x + mlp(norm(x)) if residual else mlp(norm(x))

    def fused():
        return norm_mlp(x, *layers, **vectors, residual=residual)

    run = forward_backward(DTYPES[dtype], [x, *layers, *vectors.values()], cotangent)
    group = f"{encoder}{', residual' if residual else ''}, {dtype}"
    compare(benchmark, "norm_mlp", name, group, DTYPES[dtype], run, fused, plain=plain)

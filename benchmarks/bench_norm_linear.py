"""`norm_linear` against LayerNorm, linear and addition in plain PyTorch: pytest benchmarks/bench_norm_linear.py"""

from __future__ import annotations

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare
from tools.shapes import SHAPES
from torch.nn import functional as F

from sgmim_fast.ops import cases


def plain(a):
    if a.norm_weight is None:
        return a.residual + F.linear(a.x, a.weight, a.bias)
    return F.linear(F.layer_norm(a.x, a.x.shape[-1:], a.norm_weight, a.norm_bias, a.eps), a.weight, a.bias)


@pytest.mark.parametrize("encoder", ["swin_base", "vit_base"])
@pytest.mark.parametrize("layer", ["norm and qkv", "projection and residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_norm_linear(benchmark, name, dtype, layer, encoder):
    """Forward and backward, in the encoder's deepest stage."""
    torch.manual_seed(0)
    (side, width), normed = SHAPES[encoder].deepest, layer == "norm and qkv"
    rows, out = (BATCH, side**2 + SHAPES[encoder].prefix), 3 * width if normed else width
    a = cases.norm_linear(rows, width, out, norm=normed, residual=not normed)
    compare(benchmark, "norm_linear", name, f"{encoder} {layer}", dtype, a, plain=plain)

"""`norm_mlp` against timm's norm, MLP and residual: pytest benchmarks/bench_norm_mlp.py"""

from __future__ import annotations

import pytest
import torch
from timm.layers import Mlp
from tools.agree import assert_agree
from tools.shapes import SHAPES
from torch import nn

from sgmim_fast import backends
from sgmim_fast.ops import norm_mlp

BATCH = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("encoder", ["swin_base", "vit_base"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "torch", "cpu"])
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

    def run(function, dtype=DTYPES[dtype]):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = function()
        grads = torch.autograd.grad(y, [x, *layers, *vectors.values()], cotangent.to(y.dtype))
        return [y.detach().float(), *grads]

    benchmark.group = f"norm_mlp {encoder}{', residual' if residual else ''}, {dtype}, B = {BATCH}"
    if name == "plain":
        benchmark(run, plain)
        return
    if not (usable := backends.can_run("norm_mlp", name))[0]:
        pytest.skip(usable[1])
    with backends.use(name):
        assert_agree(run(fused), run(plain), run(plain, torch.float32))
        benchmark(run, fused)

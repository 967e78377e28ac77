"""`norm_mlp` against norm, MLP and residual in plain PyTorch: pytest benchmarks/bench_norm_mlp.py"""

from __future__ import annotations

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare
from tools.shapes import SHAPES
from torch.nn import functional as F

from sgmim_fast.ops import cases


def plain(a):
    y = F.layer_norm(a.x, a.x.shape[-1:], a.norm_weight, a.norm_bias, a.eps)
    y = F.linear(F.gelu(F.linear(y, a.fc1_weight, a.fc1_bias)), a.fc2_weight, a.fc2_bias)
    return a.x + y if a.residual else y


@pytest.mark.parametrize("encoder", ["swin_base", "vit_base"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_norm_mlp(benchmark, name, dtype, residual, encoder):
    """Forward and backward, in the encoder's deepest stage."""
    torch.manual_seed(0)
    side, width = SHAPES[encoder].deepest
    a = cases.norm_mlp((BATCH, side**2 + SHAPES[encoder].prefix), width, 4 * width, residual=residual)
    compare(benchmark, "norm_mlp", name, f"{encoder}{', residual' if residual else ''}", dtype, a, plain=plain)

"""`position_bias` against the MLP in plain PyTorch: pytest benchmarks/bench_position_bias.py"""

from __future__ import annotations

import pytest
import torch
from tools.op_bench import BACKENDS, DTYPES, compare
from torch.nn import functional as F

from sgmim_fast.ops import cases


def plain(a):
    hidden = F.relu(F.linear(a.coordinates, a.fc1_weight, a.fc1_bias))
    return (a.scale * F.linear(hidden, a.fc2_weight).sigmoid()).flatten(0, -2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_position_bias(benchmark, name, heads, dtype):
    """Forward and backward, for windows of 12 x 12 tokens, with the heads of SwinV2-B's first and third stages."""
    torch.manual_seed(0)
    a = cases.position_bias((12, 12), heads, 512)
    compare(benchmark, "position_bias", name, f"{heads} heads", dtype, a, plain=plain)

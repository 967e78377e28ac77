"""`token_salience` against plain PyTorch, which stores the attention: pytest benchmarks/bench_token_salience.py"""

from __future__ import annotations

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, compare
from tools.shapes import SHAPES

from sgmim_fast.ops import cases


def written(a):
    """Plain PyTorch: stores the attention, (B, N, N)."""
    s = (a.x @ a.x.mT).softmax(-1).sum(-2)
    low, high = s.aminmax(dim=1, keepdim=True)
    return (s - low) / (high - low)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("name", ["written", *BACKENDS])
def test_token_salience(benchmark, name, encoder):
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    a = cases.token_salience((BATCH, (shape.image // shape.patch) ** 2, shape.stem))
    compare(benchmark, "token_salience", name, encoder, "float32", a, written=written)

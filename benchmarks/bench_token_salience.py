"""`token_salience` against plain PyTorch with the attention in memory: pytest benchmarks/bench_token_salience.py"""

from __future__ import annotations

import pytest
import torch
from shapes import SHAPES
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops import token_salience

BATCH = 16


def written(x: Tensor) -> Tensor:
    """Plain PyTorch, (B, N, N) at once."""
    s = (x @ x.mT).softmax(-1).sum(-2)
    low, high = s.aminmax(dim=1, keepdim=True)
    return (s - low) / (high - low)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("name", ["written", "torch", "cpu"])
def test_token_salience(benchmark, name, encoder):
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    x = torch.randn(BATCH, (shape.image // shape.patch) ** 2, shape.stem) / shape.stem**0.5
    benchmark.group = f"{encoder}, {tuple(x.shape)}"
    if name == "written":
        benchmark(written, x)
        return
    if not (usable := backends.can_run("token_salience", name, x))[0]:
        pytest.skip(usable[1])
    with backends.use(name):
        torch.testing.assert_close(token_salience(x), written(x), rtol=1e-3, atol=1e-4)
        benchmark(token_salience, x)

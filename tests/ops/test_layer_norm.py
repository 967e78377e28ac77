"""The backward of csrc/cpu/layer_norm.cpp, with residuals of either dtype, and sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import assert_close_to_truth

from sgmim_fast import backends
from sgmim_fast.ops import _plain
from sgmim_fast.ops.primitives import NormGradient

NATIVE = backends.available()["cpu"]
pytestmark = pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])
LOW, FLAGS = torch.bfloat16, (False, True)
CASES = [
    (storage, of_residual, sum_residual, sum_dx, keep)
    for storage, of_residual in itertools.product((LOW, torch.float32), (None, LOW, torch.float32))
    for sum_residual, sum_dx, keep in itertools.product(FLAGS, FLAGS, FLAGS)
    if of_residual is not None or not sum_residual
]


@pytest.mark.parametrize("size", [(1, 3), (7, 16), (37, 70)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_residual_and_sums(size, case):
    from sgmim_fast.ops.cpu import primitives

    (storage, of_residual, sum_residual, sum_dx, keep), x = case, torch.randn(size)
    statistics = torch.stack([x.mean(1), 1 / (x.var(1, correction=0) + 1e-5).sqrt()])
    vectors, dy = [torch.randn(size[1]) for _ in range(2)], torch.randn(size).to(storage)
    added = {} if of_residual is None else {"residual": torch.randn(size).to(of_residual)}
    g = NormGradient(dy, x, statistics, *vectors, sum_residual=sum_residual, sum_dx=sum_dx, keep_dy=keep, **added)
    exact = [t.double() if isinstance(t, torch.Tensor) else t for t in g]
    (truth,), (usual,) = _plain.layer_norms_backward([NormGradient(*exact)]), _plain.layer_norms_backward([g])
    before = dy.clone()
    (found,) = primitives.layer_norms_backward([g])
    wide = storage if of_residual is None else torch.promote_types(storage, of_residual)
    assert found.dx.dtype == wide
    assert not keep or torch.equal(dy, before)
    for name, three in zip(found._fields, zip(found, usual, truth, strict=True), strict=True):
        if three[2] is not None:
            assert_close_to_truth(three[0], three[1].to(wide if name == "dx" else three[1].dtype), three[2], name)
    assert (found.residual is None, found.dx_sum is None) == (not sum_residual, not sum_dx)

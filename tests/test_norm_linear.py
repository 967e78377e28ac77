"""`norm_linear` against LayerNorm and linear in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from checks import check_op, gradcheck64, gradients, opcheck
from hypothesis import given
from hypothesis import strategies as st
from packed import bias, matrix, norm_weight
from torch.nn import functional as F

from sgmim_fast.ops import norm_linear, products
from sgmim_fast.ops.norm_linear import _op

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")
EPS = 1e-6


def inputs(rows=(2, 5), width=24, out=40, with_bias=True, norm=True):
    """float64"""
    return [
        torch.randn(*rows, width, dtype=torch.float64) + 0.5,
        matrix(out, width),
        bias(out) if with_bias else None,
        norm_weight(width) if norm else None,
        bias(width) if norm else None,
    ]


def plain(x, weight, bias, norm_weight, norm_bias):
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    return F.linear(x, weight, bias)


def ours(x, weight, bias, norm_weight, norm_bias):
    return norm_linear(x, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias, eps=EPS)


check = partial(check_op, ours, plain, NAMES)


@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    width=st.integers(8, 70),
    out=st.integers(1, 40),
    with_bias=st.booleans(),
    norm=st.booleans(),
)
def test_float32(place, rows, width, out, with_bias, norm):
    check(place, inputs(rows, width, out, with_bias, norm), torch.float32)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_bfloat16(place, norm, autocast, computed_in):
    with products.compute_bfloat16_in(computed_in):
        check(place, inputs((2, 3, 8), 48, norm=norm), torch.bfloat16, autocast)


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float16(place, dtype, autocast):
    check(place, inputs((2, 3, 8), 48), dtype, autocast)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [4], [1, 2]])
@pytest.mark.parametrize("norm", [False, True])
def test_partial_gradients(place, wanted, norm):
    low = [None if t is None else t.to(place.device, torch.float32) for t in inputs(norm=norm)]
    _, complete = gradients(ours, low, torch.ones(2, 5, 40, device=place.device))
    complete = dict(zip([i for i, t in enumerate(low) if t is not None], complete, strict=True))
    if not set(wanted) <= set(complete):
        pytest.skip("there is no norm")
    for i in wanted:
        low[i].requires_grad_()
    ours(*low).sum().backward()
    for i, grad in complete.items():
        assert (low[i].grad is None) == (i not in wanted)
        if i in wanted:
            torch.testing.assert_close(low[i].grad, grad)


@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck_and_opcheck(place, norm):
    tensors = inputs((1, 3), 5, 4, norm=norm)
    if place.backend == "torch":
        gradcheck64(ours, [None if t is None else t.to(place.device) for t in tensors])
    x, *rest = [None if t is None else t.to(place.device, torch.float32).requires_grad_() for t in tensors]
    opcheck(_op.overload, (x.detach()[0].requires_grad_(), *rest, EPS, None))


def test_strides(place):
    x, *rest = (t.to(place.device, torch.float32) for t in inputs((6, 4)))
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.testing.assert_close(ours(strided, *rest), ours(x, *rest))


def test_errors():
    x, weight, bias_, scale, shift = inputs()
    with pytest.raises(ValueError, match=r"weight has shape \(40, 23\); expected .* = \(\*, 24\)"):
        norm_linear(x, weight[:, :23])
    with pytest.raises(ValueError, match=r"bias has shape \(39,\); expected .* = \(40\)"):
        norm_linear(x, weight, bias_[:39])
    with pytest.raises(ValueError, match=r"norm_weight and norm_bias: expected both or neither"):
        norm_linear(x, weight, norm_weight=scale)
    with pytest.raises(ValueError, match=r"norm_bias has shape \(23,\)"):
        norm_linear(x, weight, norm_weight=scale, norm_bias=shift[:23])
    with pytest.raises(TypeError, match=r"x has dtype torch.float64 and weight torch.float32"):
        norm_linear(x, weight.float())
    with pytest.raises(ValueError, match=r"x has shape \(24,\); expected \(\.\.\., channels\)"):
        norm_linear(x[0, 0], weight)

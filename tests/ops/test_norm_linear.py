"""`norm_linear` against LayerNorm and linear in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from checks import check_op, gradcheck64, gradients, opcheck
from hypothesis import given
from hypothesis import strategies as st
from packed import bias, matrix, norm_weight
from torch.nn import functional as F

from sgmim_fast.ops import gemm, norm_linear
from sgmim_fast.ops.norm_linear import _op

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "layer_scale", "residual")
EPS = 1e-6


def inputs(rows=(2, 5), width=24, out=40, with_bias=True, norm=True, residual=False, scale=False):
    """float64"""
    added = [torch.randn(*rows, out, dtype=torch.float64)] if residual else []
    return [
        torch.randn(*rows, width, dtype=torch.float64) + 0.5,
        matrix(out, width),
        bias(out) if with_bias else None,
        norm_weight(width) if norm else None,
        bias(width) if norm else None,
        norm_weight(out) if scale else None,
        *added,
    ]


def plain(x, weight, bias, norm_weight, norm_bias, layer_scale=None, residual=None):
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    y = F.linear(x, weight, bias)
    y = y if layer_scale is None else layer_scale * y
    return y if residual is None else residual + y


def ours(x, weight, bias, norm_weight, norm_bias, layer_scale=None, residual=None):
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "layer_scale": layer_scale}
    return norm_linear(x, weight, bias, **vectors, eps=EPS, residual=residual)


def check(place, tensors, *args):
    check_op(ours, plain, NAMES[: len(tensors)], place, tensors, *args)


@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    width=st.integers(8, 70),
    out=st.integers(1, 40),
    with_bias=st.booleans(),
    norm=st.booleans(),
    residual=st.booleans(),
    scale=st.booleans(),
)
def test_float32(place, rows, width, out, with_bias, norm, residual, scale):
    check(place, inputs(rows, width, out, with_bias, norm, residual, scale), torch.float32)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_residual_in_bfloat16(place, norm, scale, computed_in):
    with gemm.compute_bfloat16_in(computed_in):
        check(place, inputs((2, 3, 8), 48, norm=norm, residual=True, scale=scale), torch.bfloat16)


@pytest.mark.parametrize("residual", [False, True])
def test_a_float32_layer_scale_widens_the_result_under_autocast(place, residual):
    tensors = inputs((2, 3, 8), 48, residual=residual, scale=True)
    tensors = [t.to(place.device, torch.float32) for t in tensors]
    if residual:
        tensors[-1] = tensors[-1].bfloat16()
    with torch.autocast(place.device, torch.bfloat16):
        found, expected = (f(tensors[0].bfloat16(), *tensors[1:]) for f in (ours, plain))
    assert found.dtype == expected.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_a_float32_residual_stays_one_under_autocast(place, dtype, computed_in):
    """What is added is not rounded to the dtype of the gemms, nor is its gradient."""
    tensors = [None if t is None else t.to(place.device, torch.float32) for t in inputs(residual=True)]
    tensors[1:3] = [torch.zeros_like(t) for t in tensors[1:3]]
    with gemm.compute_bfloat16_in(computed_in), torch.autocast(place.device, dtype):
        result, (*_, gradient) = gradients(ours, tensors, cotangent := torch.randn_like(tensors[-1]))
    assert torch.equal(result, tensors[-1]) and torch.equal(gradient, cotangent)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_bfloat16(place, norm, autocast, computed_in):
    with gemm.compute_bfloat16_in(computed_in):
        check(place, inputs((2, 3, 8), 48, norm=norm), torch.bfloat16, autocast)


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float16(place, dtype, autocast):
    check(place, inputs((2, 3, 8), 48), dtype, autocast)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [4], [5], [6], [1, 2], [2, 5]])
@pytest.mark.parametrize("norm", [False, True])
def test_partial_gradients(place, wanted, norm):
    options = {"norm": norm, "residual": 6 in wanted, "scale": 5 in wanted}
    low = [None if t is None else t.to(place.device, torch.float32) for t in inputs(**options)]
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
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_gradcheck_and_opcheck(place, norm, residual, scale):
    tensors = inputs((1, 3), 5, 4, norm=norm, residual=residual, scale=scale)
    if place.backend == "torch":
        gradcheck64(ours, [None if t is None else t.to(place.device) for t in tensors])
    x, *rest = [None if t is None else t.to(place.device, torch.float32).requires_grad_() for t in tensors]
    rest[5:] = [rest[5].detach()[0].requires_grad_() if residual else None]
    opcheck(_op.overload, (x.detach()[0].requires_grad_(), *rest, EPS, None))


def test_strides(place):
    x, *rest, added = (t.to(place.device, torch.float32) for t in inputs((6, 4), residual=True, scale=True))
    strided, added_strided = (t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (x, added))
    torch.testing.assert_close(ours(strided, *rest, added_strided), ours(x, *rest, added))


def test_errors():
    x, weight, bias_, scale, shift, _ = inputs()
    with pytest.raises(ValueError, match=r"weight has shape \(40, 23\); expected .* = \(\*, 24\)"):
        norm_linear(x, weight[:, :23])
    with pytest.raises(ValueError, match=r"bias has shape \(39,\); expected .* = \(40\)"):
        norm_linear(x, weight, bias_[:39])
    with pytest.raises(ValueError, match=r"norm_weight and norm_bias: expected both or neither"):
        norm_linear(x, weight, norm_weight=scale)
    with pytest.raises(ValueError, match=r"norm_bias has shape \(23,\)"):
        norm_linear(x, weight, norm_weight=scale, norm_bias=shift[:23])
    with pytest.raises(ValueError, match=r"residual has shape \(2, 5, 24\); expected .* = \(2, 5, 40\)"):
        norm_linear(x, weight, residual=x)
    with pytest.raises(TypeError, match=r"residual has dtype torch.int64"):
        norm_linear(x, weight, residual=x.long())
    with pytest.raises(ValueError, match=r"layer_scale has shape \(24,\); expected \(out,\) = \(40\)"):
        norm_linear(x, weight, layer_scale=scale)
    with pytest.raises(TypeError, match=r"layer_scale with float16, .*expected another dtype"):
        norm_linear(x.half(), weight.half(), layer_scale=bias_.half())
    with pytest.raises(TypeError, match=r"x has dtype torch.float64 and weight torch.float32"):
        norm_linear(x, weight.float())
    with pytest.raises(ValueError, match=r"x has shape \(24,\); expected \(\.\.\., channels\)"):
        norm_linear(x[0, 0], weight)

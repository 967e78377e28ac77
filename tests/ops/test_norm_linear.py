"""`norm_linear`, compared with LayerNorm and linear in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from calls import Call, public
from checks import check_op, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sgmim_fast.ops import gemm, norm_linear
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import norm_linear as case

inputs = partial(case, make=FLOAT64)


def plain(a):
    x = a.x if a.norm_weight is None else F.layer_norm(a.x, a.x.shape[-1:], a.norm_weight, a.norm_bias, a.eps)
    y = F.linear(x, a.weight, a.bias)
    y = y if a.layer_scale is None else a.layer_scale * y
    return y if a.residual is None else a.residual + y


check = partial(check_op, plain, "norm_linear")


@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    width=st.integers(8, 70),
    out=st.integers(1, 40),
    options=st.fixed_dictionaries(dict.fromkeys(("bias", "norm", "residual", "layer_scale"), st.booleans())),
)
def test_float32(place, rows, width, out, options):
    check(inputs(rows, width, out, **options), place, torch.float32)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_residual_in_bfloat16(place, norm, scale, computed_in):
    with gemm.compute_bfloat16_in(computed_in):
        check(inputs((2, 3, 8), 48, norm=norm, residual=True, layer_scale=scale), place, torch.bfloat16)


@pytest.mark.parametrize("residual", [False, True])
def test_a_float32_layer_scale_widens_the_result_under_autocast(place, residual):
    a = Call("norm_linear", case((2, 3, 8), 48, residual=residual, layer_scale=True), place.device).arguments()
    a = a._replace(x=a.x.bfloat16(), residual=a.residual.bfloat16() if residual else None)
    with torch.autocast(place.device, torch.bfloat16):
        found, expected = (f(a) for f in (public("norm_linear"), plain))
    assert found.dtype == expected.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_a_float32_residual_stays_one_under_autocast(place, dtype, computed_in):
    """Neither the residual nor its gradient is rounded to the dtype of the gemms."""
    a = case(residual=True)
    call = Call("norm_linear", a._replace(weight=0 * a.weight, bias=0 * a.bias), place.device)
    with gemm.compute_bfloat16_in(computed_in), torch.autocast(place.device, dtype):
        result, (*_, gradient) = gradients(call, call.tensors, cotangent := torch.randn_like(call.tensors[-1]))
    assert torch.equal(result, call.tensors[-1]) and torch.equal(gradient, cotangent)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_bfloat16(place, norm, autocast, computed_in):
    with gemm.compute_bfloat16_in(computed_in):
        check(inputs((2, 3, 8), 48, norm=norm), place, torch.bfloat16, autocast)


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float16(place, dtype, autocast):
    check(inputs((2, 3, 8), 48), place, dtype, autocast)


def test_errors():
    x, weight, bias, norm_weight, norm_bias, *_ = inputs()
    with pytest.raises(ValueError, match=r"weight has shape \(40, 23\); expected .* = \(\*, 24\)"):
        norm_linear(x, weight[:, :23])
    with pytest.raises(ValueError, match=r"bias has shape \(39,\); expected .* = \(40\)"):
        norm_linear(x, weight, bias[:39])
    with pytest.raises(ValueError, match=r"norm_weight and norm_bias: expected both or neither"):
        norm_linear(x, weight, norm_weight=norm_weight)
    with pytest.raises(ValueError, match=r"norm_bias has shape \(23,\)"):
        norm_linear(x, weight, norm_weight=norm_weight, norm_bias=norm_bias[:23])
    with pytest.raises(ValueError, match=r"residual has shape \(2, 5, 24\); expected .* = \(2, 5, 40\)"):
        norm_linear(x, weight, residual=x)
    with pytest.raises(TypeError, match=r"residual has dtype torch.int64"):
        norm_linear(x, weight, residual=x.long())
    with pytest.raises(ValueError, match=r"layer_scale has shape \(24,\); expected \(out,\) = \(40\)"):
        norm_linear(x, weight, layer_scale=norm_weight)
    with pytest.raises(TypeError, match=r"layer_scale with float16, .*expected another dtype"):
        norm_linear(x.half(), weight.half(), layer_scale=bias.half())
    with pytest.raises(TypeError, match=r"x has dtype torch.float64 and weight torch.float32"):
        norm_linear(x, weight.float())
    with pytest.raises(ValueError, match=r"x has shape \(24,\); expected \(\.\.\., channels\)"):
        norm_linear(x[0, 0], weight)

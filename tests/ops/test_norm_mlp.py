"""`norm_mlp`, compared with LayerNorm, linear, GELU and linear in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from calls import Call, public
from checks import check_op, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sgmim_fast.ops import gemm, norm_mlp
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import norm_mlp as case

inputs = partial(case, make=FLOAT64)
RESIDUAL, POST = {"residual": True}, {"residual": True, "post_norm": True}


def plain(a):
    def norm(y):
        return y if a.norm_weight is None else F.layer_norm(y, y.shape[-1:], a.norm_weight, a.norm_bias, a.eps)

    y = a.x if a.post_norm else norm(a.x)
    y = F.linear(F.gelu(F.linear(y, a.fc1_weight, a.fc1_bias)), a.fc2_weight, a.fc2_bias)
    y = norm(y) if a.post_norm else y
    y = y if a.layer_scale is None else a.layer_scale * y
    return a.x + y if a.residual else y


check = partial(check_op, plain, "norm_mlp")
rows_and_width = given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    width=st.integers(8, 70),
    hidden=st.integers(8, 70),
    norm=st.booleans(),
)


@rows_and_width
def test_float32(place, rows, width, hidden, norm):
    check(inputs(rows, width, hidden, 16, norm=norm), place, torch.float32)


@rows_and_width
@pytest.mark.parametrize("options", [RESIDUAL, POST, {"layer_scale": True}, RESIDUAL | {"layer_scale": True}], ids=str)
def test_what_is_as_wide_as_x(place, rows, width, hidden, norm, options):
    check(inputs(rows, width, hidden, norm=norm, **options), place, torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{"out": 16, "norm": False}, {"out": 16}, {"post_norm": True}], ids=str)
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_bfloat16(place, options, autocast, computed_in):
    with gemm.compute_bfloat16_in(computed_in):
        check(inputs((2, 3, 8), 48, **options), place, torch.bfloat16, autocast)


@pytest.mark.parametrize(
    "options", [RESIDUAL, RESIDUAL | {"norm": False}, POST, {"layer_scale": True}, RESIDUAL | {"layer_scale": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_bfloat16_as_wide_as_x(place, options, computed_in):
    """Tests bfloat16 without autocast, under which the result would have the dtype of x or of the layer scale."""
    with gemm.compute_bfloat16_in(computed_in):
        check(inputs((2, 3, 8), 48, **options), place, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float16(place, dtype, autocast):
    check(inputs((2, 3, 8), 48, out=16), place, dtype, autocast)


@pytest.mark.parametrize("residual", [False, True])
def test_a_float32_layer_scale_widens_the_result_under_autocast(place, residual):
    a = Call("norm_mlp", case((2, 3, 8), 48, residual=residual, layer_scale=True), place.device).arguments()
    with torch.autocast(place.device, torch.bfloat16):
        found, expected = (f(a._replace(x=a.x.bfloat16())) for f in (public("norm_mlp"), plain))
    assert found.dtype == expected.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_a_float32_residual_stays_one_under_autocast(place, dtype, computed_in):
    """Neither the residual nor its gradient is rounded to the dtype of the gemms."""
    a = case((2, 5), 48, residual=True)  # the MLP is 0, and x gets no gradient from it
    call = Call("norm_mlp", a._replace(fc2_weight=0 * a.fc2_weight, fc2_bias=0 * a.fc2_bias), place.device)
    with gemm.compute_bfloat16_in(computed_in), torch.autocast(place.device, dtype):
        result, (dx, *_) = gradients(call, call.tensors, cotangent := torch.randn_like(call.tensors[0]))
    assert torch.equal(result, call.tensors[0]) and torch.equal(dx, cotangent)


def test_errors():
    a = inputs(out=16)
    x, layers, square = a.x, a[1:5], inputs(layer_scale=True)
    with pytest.raises(ValueError, match=r"fc1_weight has shape \(40, 23\); expected .* = \(\*, 24\)"):
        norm_mlp(x, layers[0][:, :23], *layers[1:])
    with pytest.raises(ValueError, match=r"fc2_weight has shape \(16, 39\); expected .* = \(\*, 40\)"):
        norm_mlp(x, layers[0], layers[1], layers[2][:, :39], layers[3])
    with pytest.raises(ValueError, match=r"fc2_bias has shape \(15,\); expected .* = \(16\)"):
        norm_mlp(x, *layers[:3], layers[3][:15])
    with pytest.raises(ValueError, match=r"norm_weight and norm_bias: expected both or neither"):
        norm_mlp(x, *layers, norm_weight=a.norm_weight)
    with pytest.raises(
        ValueError, match=r"fc2_weight has shape \(16, 40\); expected .*x, which is added.* = \(24, 40\)"
    ):
        norm_mlp(x, *layers, residual=True)
    with pytest.raises(TypeError, match=r"x has dtype torch.float32 and fc1_weight torch.float64"):
        norm_mlp(x.float(), *layers)

    def call(message, a, error=ValueError):
        with pytest.raises(error, match=message):
            public("norm_mlp")(a)

    call(r"layer_scale has shape \(23,\); expected .* = \(24\)", square._replace(layer_scale=square.layer_scale[:23]))
    call(r"fc2_weight has shape \(16, 40\); expected .*layer_scale.* = \(24, 40\)", inputs(out=16, layer_scale=True))
    call(r"layer_scale and post_norm: expected one of them", square._replace(post_norm=True))
    half = Call("norm_mlp", square, dtype=torch.float16).arguments()
    call(r"layer_scale with float16, .*expected another dtype", half, TypeError)

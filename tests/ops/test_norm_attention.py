"""`norm_attention`, compared with LayerNorm, linear, window attention, linear and residual in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from calls import Call, public
from checks import check_op, gradients, in_dtype
from test_position_bias import plain as plain_position_bias
from test_window_attention import plain as plain_windows
from torch.nn import functional as F

from sgmim_fast.ops import gemm, norm_linear, position_bias, window_attention
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import norm_attention as case
from sgmim_fast.ops.window_attention import Arguments as Windows

inputs = partial(case, make=FLOAT64)
PRE, POST = {"residual": True}, {"residual": True, "post_norm": True}


def plain(a):
    def norm(y):
        return y if a.norm_weight is None else F.layer_norm(y, y.shape[-1:], a.norm_weight, a.norm_bias, a.eps)

    qkv = F.linear(a.x if a.post_norm else norm(a.x), a.qkv_weight, a.qkv_bias)
    pad = None if a.qkv_bias is None else a.qkv_bias.to(qkv.dtype)
    bias = a.bias if a.coordinates is None else plain_position_bias(a.position_bias)
    attended = plain_windows(Windows(qkv, bias, a.index, a.logit_scale, pad, a.heads, a.window, a.shift))
    y = F.linear(attended.to(qkv.dtype), a.proj_weight, a.proj_bias)
    y = norm(y) if a.post_norm else y
    y = y if a.layer_scale is None else a.layer_scale * y
    return a.x + y if a.residual else y


check = partial(check_op, plain, "norm_attention")


@pytest.mark.parametrize("options", [{}, PRE, {"post_norm": True}, POST], ids=str)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("grid", [(4, 6), (5, 4)], ids=["whole", "padded"])
def test_float32(place, options, cosine, grid):
    check(inputs((2, *grid), hottest=5.0 if cosine else None, **options), place, torch.float32)


@pytest.mark.parametrize("options", [PRE, POST], ids=str)
def test_without_what_is_optional(place, options):
    check(inputs(norm=False, biases=False, bias=None, shift=(0, 0), **options), place, torch.float32)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_scale(place, residual, dtype):
    with gemm.compute_bfloat16_in(torch.bfloat16):
        check(inputs(width=32, layer_scale=True, residual=residual), place, dtype)


@pytest.mark.parametrize("options", [{}, {"post_norm": True}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_bfloat16(place, options, autocast, computed_in):
    residual = not autocast  # under autocast the result would have the dtype of x
    hottest = 2.0 if options else None  # scaled by 100, rounding of qkv would move logits by 0.4
    with gemm.compute_bfloat16_in(computed_in):
        check(inputs(width=32, hottest=hottest, residual=residual, **options), place, torch.bfloat16, autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_bias(place, dtype):
    with gemm.compute_bfloat16_in(torch.bfloat16):
        check(inputs(width=32, bias="position", hottest=2.0, **POST), place, dtype)


def test_a_computed_bias_is_that_of_its_op(place):
    a = Call("norm_attention", case(bias="position", **PRE), place.device).arguments()
    bias = position_bias(a.coordinates, a.fc1_weight, a.fc1_bias, fc2_weight=a.fc2_weight)
    given = a._replace(bias=bias, **dict.fromkeys(("coordinates", "fc1_weight", "fc1_bias", "fc2_weight")))
    assert torch.equal(public("norm_attention")(a), public("norm_attention")(given))


def test_all_tokens_in_one_window(place):
    check(inputs((2, 1, 7), window=(1, 7), shift=(0, 0), **PRE), place, torch.float32)


@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [PRE, POST], ids=str)
def test_a_float32_residual_stays_one_under_autocast(place, options, computed_in):
    """Neither the residual nor its gradient is rounded to the dtype of the gemms."""
    a = case(**options)
    zero = ["proj_bias", "norm_weight", "norm_bias"] if options is POST else ["proj_weight", "proj_bias"]
    a = a._replace(**{name: 0 * getattr(a, name) for name in zero})  # the half is 0, and x gets no gradient from it
    if options is POST:
        a = a._replace(proj_weight=0 * a.proj_weight)
    call = Call("norm_attention", a, place.device)
    with gemm.compute_bfloat16_in(computed_in), torch.autocast(place.device, torch.bfloat16):
        result, (dx, *_) = gradients(call, call.tensors, cotangent := torch.randn_like(call.tensors[0]))
    assert torch.equal(result, call.tensors[0]) and torch.equal(dx, cotangent)


def test_values_agree_with_three_ops(place):
    """Norm with qkv, window attention, and projection with residual as separate ops give the same numbers."""
    a = Call("norm_attention", case(**PRE), place.device).arguments()
    qkv = norm_linear(a.x, a.qkv_weight, a.qkv_bias, norm_weight=a.norm_weight, norm_bias=a.norm_bias, eps=a.eps)
    attended = window_attention(qkv, a.heads, a.window, a.shift, bias=a.bias, index=a.index)
    expected = norm_linear(attended, a.proj_weight, a.proj_bias, residual=a.x)
    assert torch.equal(public("norm_attention")(a), expected)


@pytest.mark.parametrize(("dtype", "widths"), [(torch.float32, 1 + 3), (torch.bfloat16, 1 + 3 + 1)])
def test_what_it_saves(dtype, widths):
    """x and qkv, of three times its width. In float32 on a CPU the attention's result is computed again."""
    a, found = Call("norm_attention", case(width=32, **PRE)._replace(dtype=None), "cpu").arguments(), []
    a = a._make(in_dtype(a, dtype))
    a = a._replace(x=a.x.detach().requires_grad_())
    with gemm.compute_bfloat16_in(dtype), torch.autograd.graph.saved_tensors_hooks(found.append, lambda t: t):
        public("norm_attention")(a)
    tokens = a.x.shape[:3].numel()
    assert sum(t.shape[-1] for t in found if t.shape[:-1].numel() == tokens) == widths * 32


def test_errors():
    a, scaled = inputs(), inputs(layer_scale=True)

    def call(message, error=ValueError, a=a, **changes):
        with pytest.raises(error, match=message):
            public("norm_attention")(a._replace(**changes))

    call(r"x has shape \(6, 16\); expected \(B, H, W, channels\)", x=a.x[0, 0])
    call(r"qkv_weight has shape \(47, 16\); expected .* = \(48, 16\)", qkv_weight=a.qkv_weight[:47])
    call(r"proj_bias has shape \(15,\); expected .* = \(16\)", proj_bias=a.proj_bias[:15])
    call(r"norm_weight and norm_bias: expected both or neither", norm_bias=None)
    call(r"heads is 3; expected a divisor", heads=3)
    call(r"bias has shape \(15, 2\); expected \(heads", index=None)
    call(r"x has dtype torch.float32 and qkv_weight torch.float64", TypeError, x=a.x.float())
    call(r"layer_scale has shape \(15,\); expected .* = \(16\)", layer_scale=scaled.layer_scale[:15])
    call(r"layer_scale and post_norm: expected one of them", a=scaled, post_norm=True)
    position = inputs(bias="position")
    call(
        r"coordinates, .* fc2_weight: expected all or none of them, with index and without bias",
        a=position,
        bias=a.bias,
    )
    call(r"coordinates, .* fc2_weight: expected all or none", a=position, fc1_bias=None)
    call(r"fc1_bias has shape \(23,\)", a=position, fc1_bias=position.fc1_bias[:23])
    call(r"fc2_weight has shape \(1, 24\); expected .* = \(2, 24\)", a=position, fc2_weight=position.fc2_weight[:1])
    call(r"index has 15; expected indices from 0 to below 15", a=position, index=position.index + 1)
    half = Call("norm_attention", scaled, dtype=torch.float16).arguments()
    call(r"layer_scale with float16, .*expected another dtype", TypeError, a=half)

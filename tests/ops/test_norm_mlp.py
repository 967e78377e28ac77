"""`norm_mlp` against LayerNorm, linear, GELU and linear in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from checks import check_op, gradcheck64, gradients, opcheck
from hypothesis import given
from hypothesis import strategies as st
from packed import bias, matrix, norm_weight
from torch.nn import functional as F

from sgmim_fast.ops import gemm, norm_mlp
from sgmim_fast.ops.norm_mlp import _op

NAMES = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "norm_weight", "norm_bias", "layer_scale")
EPS = 1e-6


def inputs(rows=(2, 5), width=24, hidden=40, out=16, norm=True, scale=False):
    """float64"""
    return [
        torch.randn(*rows, width, dtype=torch.float64) + 0.5,
        *(matrix(hidden, width), bias(hidden), matrix(out, hidden), bias(out)),
        norm_weight(width) if norm else None,
        bias(width) if norm else None,
        norm_weight(width) if scale else None,
    ]


def plain(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, layer_scale, residual=False, post_norm=False
):
    def norm(y):
        return y if norm_weight is None else F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, EPS)

    y = x if post_norm else norm(x)
    y = F.linear(F.gelu(F.linear(y, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    y = norm(y) if post_norm else y
    y = y if layer_scale is None else layer_scale * y
    return x + y if residual else y


def ours(x, *tensors, **options):
    *layers, norm_weight, norm_bias, layer_scale = tensors
    options |= {"norm_weight": norm_weight, "norm_bias": norm_bias, "layer_scale": layer_scale}
    return norm_mlp(x, *layers, eps=EPS, **options)


check = partial(check_op, ours, plain, NAMES)
check_residual = partial(check_op, partial(ours, residual=True), partial(plain, residual=True), NAMES)


@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    width=st.integers(8, 70),
    hidden=st.integers(8, 70),
    norm=st.booleans(),
)
def test_float32(place, rows, width, hidden, norm):
    check(place, inputs(rows, width, hidden, norm=norm), torch.float32)


@given(rows=st.tuples(st.integers(1, 3), st.integers(1, 9)), width=st.integers(8, 70), norm=st.booleans())
def test_residual(place, rows, width, norm):
    check_residual(place, inputs(rows, width, out=width, norm=norm), torch.float32)


POST = {"residual": True, "post_norm": True}
check_post = partial(check_op, partial(ours, **POST), partial(plain, **POST), NAMES)


@given(rows=st.tuples(st.integers(1, 3), st.integers(1, 9)), width=st.integers(8, 70), norm=st.booleans())
def test_post_norm(place, rows, width, norm):
    check_post(place, inputs(rows, width, out=width, norm=norm), torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_post_norm_in_bfloat16(place, autocast, computed_in):
    options = {"post_norm": True, "residual": not autocast}  # which would make the result as wide as x
    check = partial(check_op, partial(ours, **options), partial(plain, **options), NAMES)
    with gemm.compute_bfloat16_in(computed_in):
        check(place, inputs((2, 3, 8), 48, out=48), torch.bfloat16, autocast)


@given(
    rows=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    width=st.integers(8, 70),
    norm=st.booleans(),
    residual=st.booleans(),
)
def test_layer_scale(place, rows, width, norm, residual):
    tensors = inputs(rows, width, out=width, norm=norm, scale=True)
    (check_residual if residual else check)(place, tensors, torch.float32)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_layer_scale_in_bfloat16(place, residual, computed_in):
    tensors = inputs((2, 3, 8), 48, out=48, scale=True)
    with gemm.compute_bfloat16_in(computed_in):
        (check_residual if residual else check)(place, tensors, torch.bfloat16)


@pytest.mark.parametrize("residual", [False, True])
def test_a_float32_layer_scale_widens_the_result_under_autocast(place, residual):
    tensors = [t.to(place.device, torch.float32) for t in inputs((2, 3, 8), 48, out=48, scale=True)]
    with torch.autocast(place.device, torch.bfloat16):
        x = tensors[0].bfloat16()
        found, expected = (f(x, *tensors[1:], residual=residual) for f in (ours, plain))
    assert found.dtype == expected.dtype == torch.float32


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_residual_in_bfloat16(place, norm, computed_in):
    with gemm.compute_bfloat16_in(computed_in):
        check_residual(place, inputs((2, 3, 8), 48, out=48, norm=norm), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_a_float32_residual_stays_one_under_autocast(place, dtype, computed_in):
    """What is added is not rounded to the dtype of the gemms, nor is its gradient."""
    tensors = [t.to(place.device, torch.float32) for t in inputs((2, 5), 48, out=48)[:7]] + [None]
    tensors[3:5] = [torch.zeros_like(t) for t in tensors[3:5]]  # the MLP gives 0, and to x no gradient
    with gemm.compute_bfloat16_in(computed_in), torch.autocast(place.device, dtype):
        result, (dx, *_) = gradients(partial(ours, residual=True), tensors, cotangent := torch.randn_like(tensors[0]))
    assert torch.equal(result, tensors[0]) and torch.equal(dx, cotangent)


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


WANTED = [[0], [1], [2], [3], [4], [6], [1, 3]]
PARTIAL = [(options, [*WANTED, [7], [3, 7], [4, 7]]) for options in ({}, {"residual": True})]
PARTIAL += [(options, WANTED) for options in ({"post_norm": True}, POST)]  # without a layer scale behind the norm


@pytest.mark.parametrize(("options", "wanted"), [(options, w) for options, wanted in PARTIAL for w in wanted], ids=str)
def test_partial_gradients(place, wanted, options):
    scale = not options.get("post_norm")
    low = [t.to(place.device, torch.float32) for t in inputs(out=24, scale=True)[: 7 + scale]]
    low += [None] * (not scale)
    function = partial(ours, **options)
    _, complete = gradients(function, low, torch.ones(2, 5, 24, device=place.device))
    for i in wanted:
        low[i].requires_grad_()
    function(*low).sum().backward()
    for i, grad in enumerate(complete):
        assert low[i] is None or (low[i].grad is None) == (i not in wanted)
        if i in wanted:
            torch.testing.assert_close(low[i].grad, grad)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)], ids=str)
def test_gradcheck_and_opcheck(place, norm, options):
    tensors = inputs((1, 3), 5, 6, 5 if options[0] else 4, norm=norm, scale=options == (True, False))
    if place.backend == "torch":
        function = partial(ours, residual=options[0], post_norm=options[1])
        gradcheck64(function, [None if t is None else t.to(place.device) for t in tensors])
    x, *rest = [None if t is None else t.to(place.device, torch.float32).requires_grad_() for t in tensors]
    opcheck(_op.overload, (x.detach()[0].requires_grad_(), *rest, *options, EPS, None))


def test_errors():
    x, *layers, scale, _, _ = inputs()
    with pytest.raises(ValueError, match=r"fc1_weight has shape \(40, 23\); expected .* = \(\*, 24\)"):
        norm_mlp(x, layers[0][:, :23], *layers[1:])
    with pytest.raises(ValueError, match=r"fc2_weight has shape \(16, 39\); expected .* = \(\*, 40\)"):
        norm_mlp(x, layers[0], layers[1], layers[2][:, :39], layers[3])
    with pytest.raises(ValueError, match=r"fc2_bias has shape \(15,\); expected .* = \(16\)"):
        norm_mlp(x, *layers[:3], layers[3][:15])
    with pytest.raises(ValueError, match=r"norm_weight and norm_bias: expected both or neither"):
        norm_mlp(x, *layers, norm_weight=scale)
    with pytest.raises(
        ValueError, match=r"fc2_weight has shape \(16, 40\); expected .*x, which is added.* = \(24, 40\)"
    ):
        norm_mlp(x, *layers, residual=True)
    with pytest.raises(TypeError, match=r"x has dtype torch.float32 and fc1_weight torch.float64"):
        norm_mlp(x.float(), *layers)
    square = inputs(out=24, scale=True)
    with pytest.raises(ValueError, match=r"layer_scale has shape \(23,\); expected .* = \(24\)"):
        ours(*square[:7], square[7][:23])
    with pytest.raises(ValueError, match=r"fc2_weight has shape \(16, 40\); expected .*layer_scale.* = \(24, 40\)"):
        ours(*inputs(scale=True))
    with pytest.raises(ValueError, match=r"layer_scale and post_norm: expected one of them"):
        ours(*square, post_norm=True)
    with pytest.raises(TypeError, match=r"layer_scale with float16, .*expected another dtype"):
        ours(*(t.half() for t in square))

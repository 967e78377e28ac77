"""`norm_attention` against LayerNorm, linear, attention in windows and linear in plain PyTorch, and the residual."""

from __future__ import annotations

import pytest
import torch
from checks import check_op, gradcheck64, gradients, opcheck
from packed import bias as vector
from packed import matrix, norm_weight
from test_window_attention import plain as plain_windows
from torch.nn import functional as F

from sgmim_fast.ops import gemm, norm_attention
from sgmim_fast.ops.norm_attention import _op

NAMES = (
    *("x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "norm_weight", "norm_bias"),
    *("bias", "logit_scale", "layer_scale"),
)
EPS, HEADS = 1e-6, 2
PRE, POST = {"residual": True}, {"residual": True, "post_norm": True}


def inputs(
    grid=(4, 6), width=16, window=(2, 3), *, norm=True, cosine=False, hot=5.0, biases=True, table=True, scale=False
):
    """float64, and the index of the biases."""
    n, entries = window[0] * window[1], (2 * window[0] - 1) * (2 * window[1] - 1)
    double = torch.float64
    return [
        torch.randn(2, *grid, width, dtype=double) + 0.5,
        matrix(3 * width, width),
        vector(3 * width) if biases else None,
        matrix(width, width),
        vector(width) if biases else None,
        norm_weight(width) if norm else None,
        vector(width) if norm else None,
        torch.randn(entries, HEADS, dtype=double) if table else None,
        torch.tensor([hot, 1.0], dtype=double) if cosine else None,  # from 4.6 on it is clamped
        norm_weight(width) if scale else None,
    ], torch.randint(entries, (n, n)) if table else None


def functions(window, shift, index, *, residual=False, post_norm=False):
    """Ours and plain PyTorch's of the tensors."""

    def plain(x, qkv_weight, qkv_bias, proj_weight, proj_bias, gain, beta, bias, logit_scale, layer_scale):
        def norm(y):
            return y if gain is None else F.layer_norm(y, y.shape[-1:], gain, beta, EPS)

        qkv = F.linear(x if post_norm else norm(x), qkv_weight, qkv_bias)
        at = None if index is None else index.to(x.device)
        pad = None if qkv_bias is None else qkv_bias.to(qkv.dtype)
        attended = plain_windows(HEADS, window, shift, at)(qkv, bias, logit_scale, pad)
        y = F.linear(attended.to(qkv.dtype), proj_weight, proj_bias)
        y = norm(y) if post_norm else y
        y = y if layer_scale is None else layer_scale * y
        return x + y if residual else y

    def ours(x, qkv_weight, qkv_bias, proj_weight, proj_bias, gain, beta, bias, logit_scale, layer_scale):
        return norm_attention(
            x, HEADS, window, shift, qkv_weight=qkv_weight, qkv_bias=qkv_bias, proj_weight=proj_weight,
            proj_bias=proj_bias, norm_weight=gain, norm_bias=beta, eps=EPS, bias=bias,
            index=None if index is None else index.to(x.device), logit_scale=logit_scale,
            layer_scale=layer_scale, residual=residual, post_norm=post_norm,
        )  # fmt: skip

    return ours, plain


def check(place, tensors, index, dtype, *args, window=(2, 3), shift=(1, 1), **options):
    check_op(*functions(window, shift, index, **options), NAMES, place, tensors, dtype, *args)


@pytest.mark.parametrize("options", [{}, PRE, {"post_norm": True}, POST], ids=str)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("grid", [(4, 6), (5, 4)], ids=["whole", "padded"])
def test_float32(place, options, cosine, grid):
    check(place, *inputs(grid, cosine=cosine), torch.float32, **options)


@pytest.mark.parametrize("options", [PRE, POST], ids=str)
def test_without_what_is_optional(place, options):
    check(place, *inputs(norm=False, biases=False, table=False), torch.float32, shift=(0, 0), **options)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_scale(place, residual, dtype):
    with gemm.compute_bfloat16_in(torch.bfloat16):
        tensors, index = inputs((4, 6), 32, scale=True)
        check(place, tensors, index, dtype, residual=residual)


@pytest.mark.parametrize("options", [{}, {"post_norm": True}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_bfloat16(place, options, autocast, computed_in):
    residual = not autocast  # under autocast the result would be as wide as x
    with gemm.compute_bfloat16_in(computed_in):
        # times a hundred, a rounding of qkv would move logits by 0.4
        tensors, index = inputs((4, 6), 32, cosine="post_norm" in options, hot=2.0)
        check(place, tensors, index, torch.bfloat16, autocast, residual=residual, **options)


def test_all_tokens_in_one_window(place):
    check(place, *inputs((1, 7), window=(1, 7)), torch.float32, window=(1, 7), shift=(0, 0), **PRE)


@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [PRE, POST], ids=str)
def test_a_float32_residual_stays_one_under_autocast(place, options, computed_in):
    """What is added is not rounded to the dtype of the gemms, nor is its gradient."""
    tensors, index = inputs()
    tensors = [None if t is None else t.to(place.device, torch.float32) for t in tensors]
    zero = (3, 4, 6) if options is POST else (3, 4)  # the half gives 0, and to x no gradient
    tensors = [torch.zeros_like(t) if i in zero else t for i, t in enumerate(tensors)]
    ours, _ = functions((2, 3), (1, 1), index, **options)
    with gemm.compute_bfloat16_in(computed_in), torch.autocast(place.device, torch.bfloat16):
        result, (dx, *_) = gradients(ours, tensors, cotangent := torch.randn_like(tensors[0]))
    assert torch.equal(result, tensors[0]) and torch.equal(dx, cotangent)


WANTED = [*([i] for i in range(9)), [1, 3]]
PARTIAL = [({}, [*WANTED, [9], [3, 9], [4, 9]]), (PRE, [*WANTED, [9], [3, 9], [4, 9]]), (POST, WANTED)]


@pytest.mark.parametrize(("options", "wanted"), [(options, w) for options, wanted in PARTIAL for w in wanted], ids=str)
def test_partial_gradients(place, wanted, options):
    scale = not options.get("post_norm")
    tensors, index = inputs((5, 4), cosine=True, scale=scale)
    ours, _ = functions((2, 3), (1, 1), index, **options)
    low = [None if t is None else t.to(place.device, torch.float32) for t in tensors]
    _, complete = gradients(ours, low, torch.ones(low[0].shape, device=place.device))
    for i in wanted:
        low[i].requires_grad_()
    ours(*low).sum().backward()
    for i, grad in enumerate(complete):
        assert low[i] is None or (low[i].grad is None) == (i not in wanted)
        if i in wanted:
            torch.testing.assert_close(low[i].grad, grad)


@pytest.mark.parametrize("options", [PRE, POST], ids=str)
def test_gradcheck_and_opcheck(place, options):
    tensors, index = inputs((3, 4), 4, cosine=True, scale=options is PRE)
    if place.backend == "torch":
        gradcheck64(
            functions((2, 3), (1, 1), index, **options)[0], [None if t is None else t.to(place.device) for t in tensors]
        )
    tensors = [None if t is None else t.to(place.device, torch.float32).requires_grad_() for t in tensors]
    *layers, table, logit_scale, scale = tensors
    rest = scale, table, index.to(place.device), logit_scale, HEADS, [2, 3], [1, 1]
    opcheck(_op.overload, (*layers, *rest, options["residual"], options.get("post_norm", False), EPS, None))


def test_errors():
    (x, *layers, gain, _, table, _, _), _ = inputs()
    names = "qkv_weight", "qkv_bias", "proj_weight", "proj_bias"

    def call(message, error=ValueError, heads=HEADS, window=(2, 3), x=x, **changes):
        arguments = dict(zip(names, layers, strict=True)) | changes
        with pytest.raises(error, match=message):
            norm_attention(x, heads, window, **arguments)

    call(r"x has shape \(6, 16\); expected \(B, H, W, channels\)", x=x[0, 0])
    call(r"qkv_weight has shape \(47, 16\); expected .* = \(48, 16\)", qkv_weight=layers[0][:47])
    call(r"proj_bias has shape \(15,\); expected .* = \(16\)", proj_bias=layers[3][:15])
    call(r"norm_weight and norm_bias: expected both or neither", norm_weight=gain)
    call(r"heads is 3; expected a divisor", heads=3)
    call(r"bias has shape \(15, 2\); expected \(heads", bias=table)
    call(r"x has dtype torch.float32 and qkv_weight torch.float64", TypeError, x=x.float())


def test_values_agree_with_three_ops(place):
    """Norm and qkv, windows, projection and residual one by one give the same numbers."""
    from sgmim_fast.ops import norm_linear, window_attention

    tensors, index = inputs()
    x, w, b, proj, c, gain, beta, table, *_ = (
        None if t is None else t.to(place.device, torch.float32) for t in tensors
    )
    index = index.to(place.device)
    qkv = norm_linear(x, w, b, norm_weight=gain, norm_bias=beta, eps=EPS)
    attended = window_attention(qkv, HEADS, (2, 3), (1, 1), bias=table, index=index)
    expected = norm_linear(attended, proj, c, residual=x)
    ours, _ = functions((2, 3), (1, 1), index, **PRE)
    assert torch.equal(ours(x, w, b, proj, c, gain, beta, table, None, None), expected)


def test_errors_of_layer_scale():
    tensors, index = inputs(scale=True)
    *rest, scale = tensors
    ours, _ = functions((2, 3), (1, 1), index)
    with pytest.raises(ValueError, match=r"layer_scale has shape \(15,\); expected .* = \(16\)"):
        ours(*rest, scale[:15])
    with pytest.raises(TypeError, match=r"layer_scale with float16, .*expected another dtype"):
        ours(*(None if t is None else t.half() for t in tensors))
    post, _ = functions((2, 3), (1, 1), index, post_norm=True)
    with pytest.raises(ValueError, match=r"layer_scale and post_norm: expected one of them"):
        post(*tensors)

"""`window_attention`, compared with plain PyTorch: roll, pad, partition, attention with bias and mask, and inverses."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from calls import Call, public
from checks import AGAIN, assert_close_to_truth, gradients, in_dtype, moved
from hypothesis import given
from hypothesis import strategies as st
from packed import assert_same_bits
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import backends
from sgmim_fast.ops import window_attention
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import window_attention as case
from sgmim_fast.ops.primitives import Windows

inputs = partial(case, make=FLOAT64)


def plain(a):
    """Computes what timm's blocks do between the two projections, for autograd, with the mask from a map of labels."""
    (h, w), shift, heads = a.window, a.shift, a.heads

    def cut(x):
        x = x.view(x.shape[0], x.shape[1] // h, h, x.shape[2] // w, w, -1).transpose(2, 3)
        return x.reshape(-1, h * w, x.shape[-1])

    batch, height, width, channels = a.qkv.shape
    below, right = -height % h, -width % w
    x = a.qkv.roll((-shift[0], -shift[1]), (1, 2))
    inside = F.pad(torch.ones(height, width, dtype=torch.bool), (0, right, 0, below)).to(x.device)
    outside = x.new_zeros(channels) if a.pad is None else a.pad
    x = torch.where(inside[..., None], F.pad(x, (0, 0, 0, right, 0, below)), outside)
    q, k, v = cut(x).view(-1, h * w, 3, heads, channels // 3 // heads).permute(2, 0, 3, 1, 4)
    if a.logit_scale is None:
        logits = q * q.shape[-1] ** -0.5 @ k.mT
    else:
        factor = a.logit_scale.clamp(max=math.log(100.0)).exp()[:, None, None]
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * factor
    if a.index is not None:
        logits = logits + a.bias[a.index.flatten()].view(h * w, h * w, -1).permute(2, 0, 1)
    elif a.bias is not None:
        logits = logits + a.bias
    if any(shift):
        painted = torch.zeros(1, *x.shape[1:3], 1, device=x.device)
        if shift[0]:
            painted[:, -shift[0] :] += 1
        if shift[1]:
            painted[:, :, -shift[1] :] += 2
        painted = cut(painted)
        mask = torch.where(painted == painted.mT, 0.0, -100.0).repeat(batch, 1, 1)
        # Within a window, labels differ only where opposite borders of the image meet.
        logits = logits + mask[:, None].to(logits.dtype)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, x.shape[1] // h, x.shape[2] // w, h, w, -1)
    out = out.transpose(2, 3).reshape(batch, *x.shape[1:3], -1)[:, :height, :width]
    return out.roll(tuple(shift), (1, 2))


def draw(place, dtype, options) -> list[tuple[str, Tensor, Tensor, Tensor, Callable]]:
    """Returns name, result of the op, of plain PyTorch and of float64 for the result and all gradients of random
    inputs, and a function for plain PyTorch's result with moved inputs. The truth uses the numbers that the low
    precision holds."""
    call = Call("window_attention", inputs(**options), place.device)
    # Parameters of a model stay in float32; the padding row was cast together with the projection.
    parameters = dtype if dtype == torch.float64 else torch.float32
    low = [t.to(dtype if n in ("qkv", "pad") else parameters) for n, t in zip(call.names, call.tensors, strict=True)]
    qkv, expression = low[0], call.by(plain)
    cotangent = torch.randn_like(qkv[..., : qkv.shape[3] // 3]).double()
    truth = gradients(expression, in_dtype(low, torch.float64), cotangent)

    def plain_of(tensors: list[Tensor]) -> list[Tensor]:
        result, grads = gradients(expression, in_dtype(tensors, dtype), cotangent)
        return [result, *grads]

    usual = plain_of(low)
    actual = gradients(call.by(public("window_attention")), low, cotangent)
    assert actual[0].dtype == dtype and actual[0].is_contiguous()
    assert [g.dtype for g in actual[1]] == [t.dtype for t in low]
    names = ["result", *call.names]
    again = [lambda i=i: plain_of(moved(low))[i] for i in range(len(names))]
    return list(zip(names, [actual[0], *actual[1]], usual, [truth[0], *truth[1]], again, strict=True))


def check(place, dtype, draws=1, skip=(), **options) -> None:
    for same in zip(*(draw(place, dtype, options) for _ in range(draws)), strict=True):
        name = same[0][0]
        if name in skip:
            continue
        actual, usual, truth = (torch.stack(t) for t in list(zip(*same, strict=True))[1:4])
        again = [of_draw[4] for of_draw in same]
        if dtype == torch.float64:
            assert (actual - truth).norm() <= 1e-10 * (1 + truth.norm()), name
        elif truth.norm() > 1e-30:  # e^-100 of masked tokens is below the normal numbers of float32
            others = (torch.stack([plain() for plain in again]) for _ in range(AGAIN))
            assert_close_to_truth(actual, usual, truth, name, lambda others=others: others)
        else:
            assert actual.norm() <= 1e-30, name


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    moved=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    heads=st.integers(1, 3),
    width=st.integers(1, 20),
    bias=st.sampled_from(["table", "dense", None]),
    cosine=st.booleans(),
    pad=st.booleans(),
)
def test_float64_anywhere(grid, window, moved, heads, width, bias, cosine, pad):
    from conftest import Place

    shift = tuple(int(m * w) for m, w in zip(moved, window, strict=True))
    options = {"shape": (2, *grid), "heads": heads, "width": width, "window": window, "shift": shift}
    check(Place("torch", "cpu"), torch.float64, **options, bias=bias, hottest=5.0 if cosine else None, pad=pad)


@given(
    grid=st.tuples(st.just(2), st.integers(3, 9), st.integers(3, 9)),
    window=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    shift=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    heads=st.integers(2, 3),
    width=st.integers(4, 20),
    bias=st.sampled_from(["table", "dense", None]),
    # Cosines times 100 saturate the softmax. The error of few numbers is then sometimes ten times the median.
    hottest=st.sampled_from([None, 3.0]),
    pad=st.booleans(),
)
def test_float32(place, grid, window, shift, heads, width, bias, hottest, pad):
    options = {"shape": grid, "heads": heads, "width": width, "window": window, "shift": shift}
    skip = ("logit_scale",)
    check(place, torch.float32, draws=4, skip=skip, **options, bias=bias, hottest=hottest, pad=pad)


def test_gradient_of_the_logit_scale(place):
    """It is one number per head, a sum that nearly cancels. The error of a few depends on chance, so many are drawn."""
    options = {"shape": (2, 3, 3), "width": 5, "window": (3, 2), "hottest": 3.0}
    check(place, torch.float32, draws=100, skip=("result", "qkv", "bias", "pad"), **options)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((12, 12), (6, 6), (3, 3)),
        ((8, 8), (8, 8), (0, 0)),
        ((14, 14), (7, 7), (3, 3)),
        ((13, 10), (6, 6), (3, 3)),
        ((9, 13), (9, 9), (4, 4)),
    ],
)
def test_swin_windows(place, grid, window, shift, dtype, cosine):
    if place.backend == "triton" and dtype == torch.float32 and window[0] * window[1] > 64:
        pytest.skip("the Triton kernels hold 64 tokens in float32")
    hottest = 5.0 if cosine else None  # it is clamped from 4.6 on
    check(place, dtype, shape=(2, *grid), width=32, window=window, shift=shift, hottest=hottest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", ["dense", None])
def test_vit(place, dtype, bias):
    """One window of a class token and 10 × 10 patches."""
    if place.backend == "triton" and dtype == torch.float32:
        pytest.skip("the Triton kernels hold 64 tokens in float32")
    check(place, dtype, shape=(2, 1, 101), width=64, window=(1, 101), shift=(0, 0), bias=bias, pad=False)


def test_zero_vectors_have_cosine_zero(place):
    """As in torch.nn.functional.normalize. Keys of SwinV2's padding are zero vectors."""
    call = Call("window_attention", case(hottest=5.0), place.device)
    call.tensors[0][:, :, :, :32] = 0
    torch.testing.assert_close(call(*call.tensors), call.by(plain)(*call.tensors), rtol=1e-5, atol=1e-5)


def test_nan_is_not_hidden(place):
    qkv = case(pad=False, bias=None).qkv.to(place.device)
    qkv[0, 0, 0, 0] = torch.nan
    out = window_attention(qkv, 2, (3, 3))
    assert out[0, 0, 0, :8].isnan().all() and out[0, :, 3:].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("window", [(3, 3), (12, 14)], ids=["many windows", "large windows"])
def test_same_bits_on_any_number_of_threads(place, threads, window):
    large, grid = place.backend == "triton" and window != (3, 3), (24, 28)
    if place.interpreted and large:
        window, grid = (9, 9), (18, 9)
    call = Call("window_attention", case((2, *grid), 3, 8, window, hottest=5.0), place.device)
    low = in_dtype(call.tensors, torch.bfloat16 if large else torch.float32)
    results = []
    for number in (1, 2, 2) if place.backend == "cpu" else (2, 2):
        with threads(number):
            results.append(gradients(call, low, torch.ones(2, *grid, 24, device=place.device)))
    assert_same_bits(results)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((13, 10), (6, 6)), ((14, 14), (7, 7)), ((1, 101), (1, 101))])
def test_the_backward_also_returns_the_result(place, grid, window, cosine):
    """`out` of the primitive, for a forward that does not save its result."""
    if place.backend == "triton" and window[0] * window[1] > 64:
        pytest.skip("the Triton kernels hold 64 tokens in float32")
    p = importlib.import_module(
        ({"torch": "sgmim_fast.ops._plain"} | backends.MODULES["window_attention"])[place.backend]
    )
    shift, options = (1, 1) if window[0] < grid[0] else (0, 0), {"bias": "table", "hottest": 2.0 if cosine else None}
    qkv, *w = Call("window_attention", case((2, *grid), 2, 24, window, shift, **options), place.device).arguments()
    grad = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3, device=place.device)
    out, wanted = torch.full_like(grad, math.nan), {"qkv", "bias", "qkv_bias"}
    found = p.window_attention_backward(grad, qkv, Windows(*w), wanted, out)
    expected = p.window_attention_backward(grad, qkv, Windows(*w), wanted)
    torch.testing.assert_close(out, p.window_attention(qkv, Windows(*w)), rtol=0, atol=1e-6 * out.abs().max().item())
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in ("bias", "qkv_bias"))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("grid", "window"), [((48, 42), (6, 6)), ((13, 10), (6, 6)), ((14, 14), (14, 14)), ((1, 101), (1, 101))]
)
def test_sums_for_the_bias_of_qkv(place, grid, window, dtype, cosine):
    """They are by-products of the gradient: its sum over all tokens, and over those of windows outside of the grid."""
    if place.backend == "triton" and (dtype == torch.float32 or place.interpreted) and window[0] * window[1] > 64:
        pytest.skip("the Triton kernels hold 64 tokens in float32, and their interpreter takes long")
    if place.interpreted and grid == (48, 42):
        grid = (12, 18)
    modules = {"torch": "sgmim_fast.ops._plain"} | backends.MODULES["window_attention"]
    p = importlib.import_module(modules[place.backend])
    shift, options = (1, 1) if window[0] < grid[0] else (0, 0), {"bias": "dense", "hottest": 2.0 if cosine else None}
    call = Call("window_attention", case((2, *grid), 2, 32, window, shift, **options), place.device)
    qkv, *w = call.arguments()
    qkv, w = qkv.to(dtype), Windows(*w)
    w = w._replace(pad=w.pad.to(dtype))
    grad = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3, device=place.device).to(dtype)
    dqkv, sums = p.window_attention_backward(grad, qkv, w, {"qkv", "pad", "qkv_bias"})
    assert torch.equal(dqkv, p.window_attention_backward(grad, qkv, w, {"qkv"})[0])
    outside, total = p.finish([sums["pad"], sums["qkv_bias"]], [torch.float32] * 2)
    truth = dqkv.double().sum((0, 1, 2)) + outside.double()
    # Backends with a float32 gradient are closer to the truth than to the sum of the rounded gradient.
    rounded = dqkv.double().square().sum((0, 1, 2)).sqrt() * torch.finfo(dtype).eps
    bound = 4 * torch.finfo(torch.float32).eps * truth.norm() + (rounded.norm() if dtype != torch.float32 else 0)
    assert (total.double() - truth).norm() <= bound


def test_errors():
    qkv, bias, index, _, pad, *_ = inputs()

    def call(match, error=ValueError, qkv=qkv, heads=2, window=(3, 3), shift=(0, 0), **options):
        with pytest.raises(error, match=match):
            window_attention(qkv, heads, window, shift, **options)

    call(r"qkv has dtype torch.int64", TypeError, qkv=qkv.long())
    call(r"qkv has shape \(2, 36, 48\); expected \(B, H, W, 3 \* channels\)", qkv=qkv.flatten(1, 2))
    call(r"heads is 5; expected a divisor of the channels, qkv has 3 \* 16", heads=5)
    call(r"window is \(0, 3\); expected two integers from 1", window=(0, 3))
    call(r"shift is \(3, 0\); expected less than the window \(3, 3\)", shift=(3, 0))
    call(r"index is given without bias", index=index)
    call(r"index has shape \(9, 8\); expected .*\(9, 9\)", bias=bias, index=index[:, :8])
    call(r"index has dtype torch.int32; expected torch.int64", TypeError, bias=bias, index=index.int())
    call(r"bias has shape \(25, 2\); expected .* = \(2, 9, 9\)", bias=bias)
    call(r"bias has shape \(2, 9, 9\); expected", bias=torch.zeros(2, 9, 9), index=index)
    call(r"logit_scale has shape \(3,\); expected .*\(2\)", logit_scale=torch.zeros(3))
    call(r"pad has shape \(47,\); expected .*\(48\)", pad=pad[:47])
    call(r"bias is on meta; expected cpu", bias=bias.to("meta"), index=index)


def test_cpu_rejects_an_index_out_of_range():
    if not backends.can_run("window_attention", "cpu")[0]:
        pytest.skip("the C++ library is not built")
    qkv, bias, index, *_ = case()
    index[0, 0] = 25
    with backends.use("cpu"), pytest.raises(RuntimeError, match="index has 25"):
        window_attention(qkv, 2, (3, 3), bias=bias, index=index)


def test_what_triton_leaves_to_others():
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    from sgmim_fast.fused.block import windows_reason
    from sgmim_fast.kernels.primitives import takes
    from sgmim_fast.ops.window_attention import request

    def reason(qkv, heads=2, window=(16, 16)):
        usable, why = takes(request(qkv, Windows(None, None, None, None, heads, list(window), [0, 0])))
        return None if usable else why

    qkv = torch.zeros(1, 2, 2, 3 * 256)
    assert reason(qkv, window=(8, 8)) is None and reason(qkv.half()) is None
    assert "windows of 65 tokens; the Triton kernels hold 64 in torch.float32" in reason(qkv, window=(1, 65))
    assert "windows of 1056 tokens" in reason(qkv.bfloat16(), window=(33, 32))
    assert "heads of 256 channels" in reason(qkv, heads=1, window=(8, 8))
    assert "dtype torch.float64" in reason(qkv.double())
    # Accelerated blocks use this condition: otherwise timm's attention is preferred to plain PyTorch's here.
    elsewhere = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert not windows_reason(elsewhere, 1024) and windows_reason(elsewhere, 1025)

"""Sums over very many rows are as accurate as PyTorch's pairwise sums."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from checks import assert_close_to_truth
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import backends, ops
from sgmim_fast.ops import GuidanceParameters
from sgmim_fast.ops.cases import FLOAT32

ROWS = 150_000  # a batch of 128 has 3 times as many at the first level of Swin-B


def vectors(*sizes: int) -> list[Tensor]:
    return [torch.randn(size).requires_grad_() for size in sizes]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(function(*inputs), inputs, cotangent.to(inputs[0].dtype)))


@pytest.fixture(params=["constant", "random"])
def cotangent(request, place):
    if place.interpreted:
        pytest.skip("150,000 rows take minutes in the interpreter")
    wanted = torch.full((ROWS, 4), 0.1) if request.param == "constant" else torch.randn(ROWS, 4)
    return wanted.to(place.device)


def check(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor) -> None:
    inputs = [t.to(cotangent.device).detach().requires_grad_() for t in inputs]
    actual, usual = (gradients(function, inputs, cotangent) for function in (ours, plain))
    truth = gradients(plain, [t.detach().double().requires_grad_() for t in inputs], cotangent)
    for i, three in enumerate(zip(actual, usual, truth, strict=True)):
        assert_close_to_truth(*three, f"gradient {i}")


def test_biases_of_linear_layers_and_norms(cotangent):
    x = torch.randn(ROWS, 4, device=cotangent.device)
    weight, gain, shift, bias = vectors(4, 4, 4, 4)
    weight = torch.randn(4, 4)

    def ours(gain, shift, bias):
        w = weight.to(x.device, gain.dtype)
        return ops.norm_linear(x.to(gain.dtype), w, bias, norm_weight=gain, norm_bias=shift)

    def plain(gain, shift, bias):
        w = weight.to(x.device, gain.dtype)
        return F.linear(F.layer_norm(x.to(gain.dtype), (4,), gain, shift), w, bias)

    check(ours, plain, [gain, shift, bias], cotangent)


def test_biases_of_mlps(cotangent):
    x = torch.randn(ROWS, 4, device=cotangent.device)
    fc1, fc2 = torch.randn(4, 4), torch.randn(4, 4)

    def weights(like):
        return (t.to(x.device, like.dtype) for t in (x, fc1, fc2))

    def ours(b1, b2):
        x, w1, w2 = weights(b1)
        return ops.norm_mlp(x, w1, b1, w2, b2)

    def plain(b1, b2):
        x, w1, w2 = weights(b1)
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    check(ours, plain, vectors(4, 4), cotangent)


def test_biases_and_tokens_of_stems(cotangent):
    side = 50
    images = ROWS // side**2
    x, weight = torch.randn(images, 1, side, side), torch.randn(4, 1, 1, 1)
    hidden = torch.rand(ROWS) < 0.5
    visible = (~hidden).nonzero().view(-1).to(cotangent.device)

    def ours(bias, token):
        pixels, w = (t.to(cotangent.device, bias.dtype) for t in (x, weight))
        return ops.masked_patch_embed(pixels, w, bias, token, visible).flatten(0, 1)

    def plain(bias, token):
        pixels, w = (t.to(cotangent.device, bias.dtype) for t in (x, weight))
        tokens = F.conv2d(pixels, w, bias).flatten(2).mT.flatten(0, 1)
        return torch.where(hidden.to(tokens.device)[:, None], token, tokens)

    check(ours, plain, vectors(4, 4), cotangent)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 300), st.sampled_from([1, 5, 24, 64, 300, 1030])), max_size=3, min_size=1)
)
def test_column_sums(place, shapes):
    modules = {"torch": "sgmim_fast.ops._plain"} | backends.MODULES["norm_linear"]
    if place.backend not in modules:
        pytest.skip(f"{place.backend} has no sums of its own")
    primitives = importlib.import_module(modules[place.backend])
    xs = [torch.randn(shape, device=place.device) for shape in shapes]
    found = primitives.finish(primitives.column_sums(xs), [torch.float32] * len(xs))
    for x, total in zip(xs, found, strict=True):
        torch.testing.assert_close(total.view(-1), x.double().sum(0).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("context", ["keep", "drop"])
def test_a_single_key_has_no_gradient(place, context):
    """Its weight is 1 whatever query and key are, so the gradients of both are exactly 0."""
    visible, shown = FLOAT32.rows(torch.ones(2, 3, dtype=torch.bool)), FLOAT32.rows(torch.eye(3, dtype=torch.bool)[:2])
    if context == "keep":
        shown = FLOAT32.rows(torch.zeros(2, 3, dtype=torch.bool))
    shapes = [(32,)] * 4 + [(32, 32)] * 4 + [(32,)] * 3 + [(48, 32), (48,), (32, 48), (32,)]
    w = GuidanceParameters(*(torch.randn(shape, device=place.device).requires_grad_() for shape in shapes))
    features, structure = (torch.randn(n, 32, device=place.device) for n in (6, shown.index.numel() + 1))
    visible, shown = (type(rows)(*(t.to(place.device) for t in rows)) for rows in (visible, shown))
    out = ops.relational_guidance(features, structure, visible, shown, w, heads=2, hidden_context=context)
    out.square().sum().backward()
    assert not w.q_weight.grad.any() and not w.k_weight.grad.any()
    assert w.v_weight.grad.any()

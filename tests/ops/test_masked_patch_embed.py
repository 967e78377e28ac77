from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from calls import Call, public
from checks import check_op, gradients, layouts
from hypothesis import given
from hypothesis import strategies as st
from packed import assert_same_bits

from sgmim_fast.ops import gemm, masked_patch_embed
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import masked_patch_embed as case

inputs = partial(case, make=FLOAT64)


def plain(a):
    """The op in plain PyTorch, for all patches."""
    tokens = F.conv2d(a.x, a.weight, a.bias, stride=a.weight.shape[2]).flatten(2).mT
    if a.norm_weight is not None:
        tokens = F.layer_norm(tokens, tokens.shape[2:], a.norm_weight, a.norm_bias, a.eps)
    mask = torch.ones(tokens.shape[:2], device=tokens.device).flatten().index_fill(0, a.visible, 0)
    mask = mask.view(*tokens.shape[:2], 1).to(tokens.dtype)
    return tokens * (1 - mask) + a.mask_token * mask


check = partial(check_op, plain, "masked_patch_embed")


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    patch=st.sampled_from([1, 2, 4, 7]),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    width=st.integers(8, 70),  # gradients of a LayerNorm over two or three values are nearly only rounding errors
    norm=st.booleans(),
    share=st.floats(0, 1),
)
def test_float32(place, batch, channels, patch, grid, width, norm, share):
    check(inputs(batch, grid, channels, patch, width, norm=norm, share=share), place, torch.float32)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_bfloat16(place, norm, autocast, computed_in):
    with gemm.compute_bfloat16_in(computed_in):
        check(inputs(width=48, norm=norm), place, torch.bfloat16, autocast)


def test_swin_stem(place):
    check(inputs(2, (12, 12), width=128), place, torch.float32)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_visible(place, norm, share):
    check(inputs(norm=norm, share=share), place, torch.float32)


def test_without_bias(place):
    check(inputs(bias=False), place, torch.float32)


def test_masked_patches_are_never_read(device):
    call = Call("masked_patch_embed", case(1, (2, 2), 3, 2, visible=torch.tensor([1, 3])), device)
    leaves = [t.requires_grad_() for t in call.tensors]
    x, token = leaves[0], leaves[3]
    with torch.no_grad():
        x[:, :, :2, :2] = torch.nan
    out = call(*leaves)
    assert torch.equal(out[0, 0], token) and torch.equal(out[0, 2], token)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)
    assert not x.grad[:, :, :2, :2].any()


def test_layouts(place):
    call = Call("masked_patch_embed", case(), place.device)
    x, weight, *rest = call.tensors
    rest = [weight.contiguous(memory_format=torch.channels_last), *rest]
    cotangent = torch.randn(3, 15, 21, device=place.device)
    for name, layout in layouts(x).items():
        expected, actual = (gradients(call, [t, *rest], cotangent) for t in (layout.contiguous(), layout))
        assert_same_bits([expected, actual], name)


def test_same_bits_each_time_and_with_any_number_of_threads(place, threads):
    call = Call("masked_patch_embed", case(4, (8, 8), width=64), place.device)
    cotangent = torch.randn(4, 64, 64, device=place.device)
    results = []
    for number in (1, 1, 2):
        with threads(number):
            results.append(gradients(call, call.tensors, cotangent))
    assert_same_bits(results[:2])
    if place.backend == "cpu":  # its own sums are reproducible; gemms of torch and the library need not be
        assert_same_bits([grads[2:] for _, grads in results])  # gradients of bias, mask token and norm


def test_compile(place):
    call = Call("masked_patch_embed", case(), place.device)
    cotangent = torch.randn(3, 15, 21, device=place.device)
    visible, eps = call.arguments().visible, call.arguments().eps

    def function(x, weight, bias, token, norm_weight, norm_bias):
        options = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
        return masked_patch_embed(x, weight, bias, token, visible, **options) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = (gradients(f, call.tensors, c) for f, c in ((compiled, cotangent), (call, 2 * cotangent)))
    assert torch.equal(actual[0], 2 * expected[0])
    # On a GPU, PyTorch adds the rows of the torch backend's gradients in any order.
    tolerance = 1e-5 if (place.backend, place.device) == ("torch", "cuda") else 0
    torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [[0, 99], [3, 3]])
def test_bad_indices_raise_in_the_cpp_kernel(place, rows):
    if place.backend != "cpu":
        pytest.skip("the C++ kernel looks; duplicates elsewhere would need a search")
    with pytest.raises(RuntimeError, match=f"has {rows[1]}"):
        public("masked_patch_embed")(case(1, visible=torch.tensor(rows)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, ValueError, r"x has shape \(3, 8, 8\)"),
        ({"x": torch.zeros(1, 3, 8, 9)}, ValueError, "x has 8x9 pixels; expected multiples of the cell size 4"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, "x has dtype torch.uint8"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.float64)}, TypeError, "x has dtype torch.float64 and weight"),
        ({"x": torch.zeros(1, 1, 8, 8)}, ValueError, r"weight has shape \(5, 3, 4, 4\)"),
        ({"weight": torch.zeros(5, 3, 4, 2)}, ValueError, r"weight has shape \(5, 3, 4, 2\); expected \(D, C, p, p\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\)"),
        (
            {"mask_token": torch.zeros(1, 1, 5)},
            ValueError,
            r"mask_token has shape \(1, 1, 5\); expected \(D,\)",
        ),
        ({"mask_token": torch.zeros(5, device="meta")}, ValueError, "mask_token is on meta; expected cpu"),
        ({"visible": torch.zeros(1)}, TypeError, "visible has dtype torch.float32"),
        ({"norm_weight": torch.zeros(5)}, ValueError, "norm_bias is None"),
        ({"norm_bias": torch.zeros(5)}, ValueError, "norm_weight is None"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "x": torch.zeros(1, 3, 8, 8),
        "weight": torch.zeros(5, 3, 4, 4),
        "bias": torch.zeros(5),
        "mask_token": torch.zeros(5),
        "visible": torch.zeros(1, dtype=torch.int64),
        **change,
    }
    with pytest.raises(error, match=message):
        masked_patch_embed(**arguments)

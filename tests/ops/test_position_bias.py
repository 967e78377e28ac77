"""`position_bias`, compared with the MLP in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from calls import Call, public
from checks import assert_all_close_to_truth, assert_passes_with, check_op, gradients, in_dtype
from hypothesis import given
from hypothesis import strategies as st
from timm.models.swin_transformer_v2 import WindowAttention
from torch.nn import functional as F

from sgmim_fast.ops import position_bias
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import position_bias as case


def plain(a):
    hidden = F.relu(F.linear(a.coordinates, a.fc1_weight, a.fc1_bias))
    return (a.scale * F.linear(hidden, a.fc2_weight).sigmoid()).flatten(0, -2)


@given(
    window=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    heads=st.integers(1, 20),
    hidden=st.integers(1, 70),
    scale=st.sampled_from([1.0, 16.0]),
)
def test_float32(place, window, heads, hidden, scale):
    check_op(plain, "position_bias", case(window, heads, hidden, scale=scale, make=FLOAT64), place, torch.float32)


def test_swinv2s_sizes(place):
    check_op(plain, "position_bias", case((12, 12), 4, 512, make=FLOAT64), place, torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_in_bfloat16_and_autocast_are_computed_in_float32(place, autocast):
    call = Call("position_bias", case((3, 3), 4, 32, make=FLOAT64), place.device)
    low = in_dtype(call.tensors, torch.float32 if autocast else torch.bfloat16)
    cotangent = torch.randn_like(plain(call.arguments()))
    with torch.autocast(place.device, torch.bfloat16, enabled=autocast):
        result, found = gradients(call.by(public("position_bias")), low, cotangent)
    assert result.dtype == torch.float32 and [g.dtype for g in found] == [t.dtype for t in low]
    wide = gradients(call.by(plain), in_dtype(low, torch.float32), cotangent)
    truth = gradients(call.by(plain), in_dtype(low, torch.float64), cotangent)
    usual = [g.to(t.dtype) for g, t in zip(wide[1], low, strict=True)]
    three = [result, *found], [wide[0], *usual], [truth[0], *truth[1]]
    assert_all_close_to_truth(*three, ["result", *call.names])


def test_the_table_of_timms_attention(place):
    torch.manual_seed(0)
    attn = WindowAttention(24, (4, 4), 3).to(place.device)
    expected = 16 * attn.cpb_mlp(attn.relative_coords_table).sigmoid().view(-1, 3)
    first, _, second = attn.cpb_mlp
    found = position_bias(attn.relative_coords_table, first.weight, first.bias, second.weight)
    torch.testing.assert_close(found, expected)


def test_logits_that_saturate_and_nan(place):
    a = case((1, 2), 2, 1)
    logits = torch.tensor([-200.0, -80.0, 0.0, 80.0, 200.0, float("nan")])
    coordinates = torch.stack([logits, torch.zeros(6)], 1)
    # relu(x) - relu(-x) = x
    layers = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2), torch.tensor([[1.0, -1.0]]).repeat(2, 1)
    a = a._replace(coordinates=coordinates, fc1_weight=layers[0], fc1_bias=layers[1], fc2_weight=layers[2])
    a = Call("position_bias", a, place.device).arguments()
    torch.testing.assert_close(public("position_bias")(a), plain(a), equal_nan=True)


def test_any_number_of_threads_gives_the_same_bits(backend, device):
    if device.type != "cpu":
        pytest.skip("the threads are the CPU's")
    call = Call("position_bias", case((8, 8), 6, 100))
    cotangent, threads = torch.randn(225, 6), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result, found = gradients(call, call.tensors, cotangent)
            results.append([result, *found[1:]])  # the library computes the gradient of the coordinates
    finally:
        torch.set_num_threads(threads)
    if backend != "torch":  # the torch backend uses the library's gemms
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_other_instruction_sets():
    assert_passes_with(["baseline", "avx2", "avx512"], __file__, "cpu and (swinv2 or saturate)")


def test_errors():
    coordinates, fc1_weight, fc1_bias, fc2_weight, _ = case()
    call = partial(position_bias, coordinates, fc1_weight, fc1_bias)
    with pytest.raises(ValueError, match=r"coordinates has shape \(1, 3, 5, 1\); expected \(\.\.\., 2\)"):
        position_bias(coordinates[..., :1], fc1_weight, fc1_bias, fc2_weight)
    with pytest.raises(TypeError, match=r"coordinates has dtype torch.int64; expected a floating-point dtype"):
        position_bias(coordinates.long(), fc1_weight, fc1_bias, fc2_weight)
    with pytest.raises(ValueError, match=r"fc1_weight has shape \(24, 1\); expected \(hidden, 2\) = \(\*, 2\)"):
        position_bias(coordinates, fc1_weight[:, :1], fc1_bias, fc2_weight)
    with pytest.raises(ValueError, match=r"fc1_bias has shape \(23,\); expected \(hidden,\) = \(24\)"):
        position_bias(coordinates, fc1_weight, fc1_bias[:-1], fc2_weight)
    with pytest.raises(ValueError, match=r"fc2_weight has shape \(2, 23\); expected \(heads, hidden\) = \(\*, 24\)"):
        call(fc2_weight[:, :-1])
    with pytest.raises(TypeError, match=r"fc2_weight has dtype torch.int64"):
        call(fc2_weight.long())

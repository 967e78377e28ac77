"""`linear_l1` and `linear_l2`, compared with plain PyTorch on the unfolded map, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from calls import Call
from checks import AGAIN, assert_close_to_truth, gradients, in_dtype, layouts, moved
from hypothesis import given
from hypothesis import strategies as st
from packed import HALF, PRECISIONS, assert_draws_close_to_truth, assert_same_bits_on_any_threads
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import ops
from sgmim_fast.ops import gemm
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import linear_l1 as case


def ours(a):
    op = ops.linear_l2 if a.squared else ops.linear_l1
    return op(**{name: value for name, value in a._asdict().items() if name not in ("squared", "dtype")})


def plain(a):
    wide = torch.float64 if a.x.dtype == torch.float64 else torch.float32

    def cells(pixels: Tensor) -> Tensor:
        return F.unfold(pixels.to(wide), a.cell, stride=a.cell).transpose(1, 2).flatten(0, 1)[a.rows]

    pixels = cells(a.target)
    if a.normalized:  # as in MAE
        mean = pixels.mean(dim=-1, keepdim=True)
        var = pixels.var(dim=-1, keepdim=True) if len(pixels) else 0  # PyTorch would warn
        pixels = (pixels - mean) / (var + 1.0e-6) ** 0.5
    difference = F.linear(a.x if a.packed else a.x[a.rows], a.weight, a.bias).to(wide) - pixels
    distance = difference**2 if a.squared else difference.abs()
    return (distance * (1 if a.valid is None else cells(a.valid))).sum() * a.scale


def call_of(case: Callable[..., Any], device: Any = "cpu", dtype: Any = None, **options: Any) -> Call:
    return Call("linear_l1", case(make=FLOAT64, **options), device, dtype)


CASES = {
    "ragged": partial(case, (3, 1, 6)),
    "nothing-in-an-image": partial(case, (4, 0, 2)),
    "nothing-at-all": partial(case, (0, 0)),
    "everything": partial(case, (6, 6)),
    "one-token-per-cell": partial(case, (3, 0, 6), packed=False),
    "one-token-per-cell-nothing": partial(case, (0, 0), packed=False),
    "colour": partial(case, (2, 4), channels=3, cell=8, width=24),
    "colour-one-token-per-cell": partial(case, (2, 4), channels=3, cell=8, width=24, packed=False, scale=1 / 1152),
    "valid": partial(case, (3, 5), channels=2, cell=8, valid=True, scale=0.3),
    "valid-one-token-per-cell": partial(case, (3, 5), channels=2, cell=16, valid=True, packed=False),
    "patch-14": partial(case, (3, 5), cell=14, width=40),
    "odd": partial(case, (2, 3), grid=(3, 1), channels=2, cell=5, width=7, valid=True),
    "a-pixel": partial(case, (2, 3), channels=3, cell=1, width=5),
    "stride-32": partial(case, (9, 5), grid=(3, 3), cell=32, width=64),
    "squares": partial(case, (3, 1, 6), squared=True),
    "squares-nothing-at-all": partial(case, (0, 0), squared=True, normalized=True),
    "squares-one-token-per-cell": partial(case, (3, 0, 6), channels=3, packed=False, squared=True, scale=1 / 432),
    "squares-valid": partial(case, (3, 5), channels=2, cell=5, width=7, valid=True, squared=True),
    "normalized": partial(case, (3, 1, 6), channels=3, cell=8, normalized=True),
    "normalized-squares": partial(
        case, (3, 1, 6), channels=3, cell=16, width=40, squared=True, normalized=True, scale=1 / 768
    ),
    "normalized-odd": partial(
        case, (2, 3), grid=(3, 1), channels=2, cell=5, width=7, packed=False, squared=True, normalized=True
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_precision = pytest.mark.parametrize("precision", [*PRECISIONS, HALF])


def cotangent_of(call: Call) -> Tensor:
    """Returns a float32 number, so that the scale is the same in every precision."""
    return torch.tensor(0.37, device=call.tensors[0].device).double()


@every_case
@every_precision
@pytest.mark.parametrize("decided", [False, True], ids=["any sign", "gradients"])
def test_value_and_gradients(backend, device, precision, case, decided):
    """If signs depend on rounding errors, only the value is compared."""
    draw = partial(call_of, case, device, precision.dtype, decided=decided)
    if decided:
        assert_draws_close_to_truth(draw, ours, plain, cotangent_of, precision, result=torch.float32)
        return
    call = draw()
    with gemm.compute_bfloat16_in(precision.compute):
        result = ours(call.arguments())
    assert result.dtype == torch.float32 and result.shape == ()
    exact = call.by(plain)(*in_dtype(call.tensors, torch.float64))
    again = lambda: (call.by(plain)(*moved(call.tensors)) for _ in range(AGAIN))  # noqa: E731
    assert_close_to_truth(result, plain(call.arguments()), exact, again=again)


@every_case
def test_float64(case):
    """Tests the torch backend, here with signs on both sides of zero."""
    call = call_of(case)
    actual, expected = (gradients(call.by(function), call.tensors, cotangent_of(call)) for function in (ours, plain))
    assert actual[0].dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    channels=st.integers(1, 3),
    cell=st.integers(1, 19),
    width=st.integers(1, 70),
    packed=st.booleans(),
    pixels=st.sampled_from(["all", "valid", "normalized"]),
    squared=st.booleans(),
)
def test_any_shape(backend, device, counts, channels, cell, width, packed, pixels, squared):
    """Every element is right. The tests of fixed cases check the accuracy."""
    torch.manual_seed(0)
    normalized = pixels == "normalized" and channels * cell**2 > 1
    options = {"packed": packed, "valid": pixels == "valid", "squared": squared, "normalized": normalized}
    one = partial(case, counts, (2, 2), channels, cell, width, **options)
    call = call_of(one, device, torch.float32, decided=True)
    actual = gradients(call.by(ours), call.tensors, cotangent_of(call))
    expected = gradients(call.by(plain), in_dtype(call.tensors, torch.float64), cotangent_of(call))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


@every_precision
def test_exact_hits_have_no_gradient(backend, device, precision):
    """|0| has gradient 0, all others ±1. The numbers are small integers, which are exact in every precision."""
    a = case((2, 3), channels=2)
    bias, offset = torch.arange(32.0) % 5, torch.randint(-1, 2, a.target.shape)
    target = F.fold(bias.expand(12, 32).unflatten(0, (2, 6)).mT, a.target.shape[2:], 4, stride=4) + offset
    a = a._replace(weight=torch.zeros_like(a.weight), bias=bias, target=target)
    call = Call("linear_l1", a, device, precision.dtype)
    with gemm.compute_bfloat16_in(precision.compute):
        result, actual = gradients(call.by(ours), call.tensors, torch.tensor(1.0, device=device))
    counted = torch.zeros(12).index_fill_(0, a.rows, 1).view(2, 1, 2, 3)
    expected = offset * F.interpolate(counted, scale_factor=4)
    assert torch.equal(actual[3].cpu().double(), expected.double())
    assert result.item() == expected.abs().sum().item()


def test_nothing_is_read_where_the_target_is_not_valid(backend, device):
    call = Call("linear_l1", case((3, 5), channels=2, cell=8, valid=True), device)
    expected = gradients(call, call.tensors, cotangent_of(call))
    *rest, target = call.tensors
    actual = gradients(call, [*rest, torch.where(call.arguments().valid, target, torch.nan)], cotangent_of(call))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
@pytest.mark.parametrize("name", ["target", "valid"])
def test_layouts(backend, device, name, layout):
    a = Call("linear_l1", case(channels=3, cell=8, valid=True), device).arguments()
    strided = layouts(getattr(a, name))[layout]
    calls = (Call("linear_l1", a._replace(**{name: t}), device) for t in (strided, strided.contiguous()))
    actual, expected = (gradients(call, call.tensors, cotangent_of(call)) for call in calls)
    # On a GPU another layout selects another kernel, whose threads add other numbers.
    torch.testing.assert_close(actual, expected, rtol=1e-6 if device.type == "cuda" else 0, atol=0)


@every_precision
@pytest.mark.parametrize("packed", [True, False])
def test_autocast(backend, device, precision, packed):
    """float32 weights, low-precision gemms: as a call in that dtype, but gradients have the dtype of the weights."""
    one = partial(case, (3, 6), channels=2, cell=8, width=40, packed=packed)
    autocast = torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32)
    draw = partial(call_of, one, device, torch.float32, decided=True)
    options = {"result": torch.float32, "autocast": autocast}
    assert_draws_close_to_truth(draw, ours, plain, cotangent_of, precision, **options)


def test_autocast_of_mixed_dtypes():
    """bfloat16 tokens of an autocast encoder are combined with float32 weights."""
    call = Call("linear_l1", case((3, 6)))
    x, *rest = call.tensors
    with torch.autocast("cpu", torch.bfloat16):
        result, grads = gradients(call, [x.bfloat16(), *rest], cotangent_of(call))
    assert result.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.bfloat16, *[torch.float32] * 3]


def test_float16_runs_on_the_torch_backend():
    call = call_of(partial(case, (3, 6)), dtype=torch.float16)
    truth = call.by(plain)(*in_dtype(call.tensors, torch.float64))
    assert_close_to_truth(ours(call.arguments()), plain(call.arguments()), truth)


@every_precision
def test_same_bits_again_and_on_any_number_of_threads(backend, device, threads, monkeypatch, precision):
    call = call_of(partial(case, (9, 0, 7), (3, 3), cell=32, channels=2, width=64), device, precision.dtype)
    assert_same_bits_on_any_threads(call, cotangent_of(call), precision, backend, threads, monkeypatch)


def bad(**changes):
    """Returns the arguments of a call, with some of them changed."""
    x, weight, bias, target, _, rows, *_ = case()
    arguments = {"x": x, "weight": weight, "bias": bias, "target": target, "rows": rows, "cell": 4}
    return {name: changes[name](value) if name in changes else value for name, value in arguments.items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": lambda x: x.long()}, TypeError, "x has dtype torch.int64; expected a floating-point dtype"),
        ({"x": lambda x: x[:, :-1]}, ValueError, r"weight has shape \(16, 16\); expected .* = \(16, 15\)"),
        ({"x": lambda x: x[:-1]}, ValueError, r"x has shape \(5, 16\); expected \(rows, channels\) = \(6, \*\)"),
        ({"x": lambda x: x[None]}, ValueError, r"x has shape \(1, 6, 16\); expected \(rows, channels\)"),
        (
            {"x": lambda x: x.double()},
            TypeError,
            "x has dtype torch.float64 and weight torch.float32; expected the same",
        ),
        ({"x": lambda x: x.to("meta")}, ValueError, "weight is on cpu; expected meta, where the other arguments are"),
        ({"weight": lambda w: w[:-1]}, ValueError, r"weight has shape \(15, 16\); expected .* = \(16, 16\)"),
        ({"bias": lambda b: b[:-1]}, ValueError, r"bias has shape \(15,\); expected \(channels \* cell\^2,\) = \(16\)"),
        ({"target": lambda t: t[0]}, ValueError, r"target has shape \(1, 8, 12\); expected \(B, C, H, W\)"),
        (
            {"target": lambda t: t[:, :, 1:]},
            ValueError,
            "target has 7x12 pixels; expected multiples of the cell size 4",
        ),
        ({"rows": lambda r: r.int()}, TypeError, "rows has dtype torch.int32; expected torch.int64"),
        ({"rows": lambda r: r[None]}, ValueError, r"rows has shape \(1, 6\); expected one dimension"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        ops.linear_l1(**bad(**changes))


def test_bad_valid_and_normalized():
    target = bad()["target"]
    with pytest.raises(ValueError, match="normalized is given with valid; expected one of them"):
        ops.linear_l1(**bad(), valid=torch.ones_like(target) > 0, normalized=True)
    head = {"x": torch.ones(1, 3), "weight": torch.ones(1, 3), "bias": torch.ones(1), "cell": 1}
    with pytest.raises(ValueError, match="normalized is given for cells of one value; expected at least two"):
        ops.linear_l2(**head, target=torch.ones(1, 1, 1, 1), rows=torch.tensor([0]), normalized=True)
    with pytest.raises(TypeError, match=r"valid has dtype torch\.float32; expected torch\.bool"):
        ops.linear_l1(**bad(), valid=torch.ones_like(target))
    with pytest.raises(ValueError, match=r"valid has shape \(2, 1, 8, 4\); expected the target's shape"):
        ops.linear_l1(**bad(), valid=target[..., :4] > 0)

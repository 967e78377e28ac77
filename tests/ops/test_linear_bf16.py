"""fprop and dgrad of csrc/cpu/linear_bf16.cpp and their epilogues, and when they are chosen."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close_to_truth
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import backends
from sgmim_fast.ops import gemm
from sgmim_fast.ops.cpu import gemm as cpu_gemm

NATIVE = backends.available()["cpu"]
pytestmark = [
    pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1]),
    pytest.mark.skipif(
        NATIVE[0] and torch.ops.sgmim_fast_cpu.isa() != "avx512bf16", reason="needs AVX512-BF16, not lowered"
    ),
]
LOW = torch.bfloat16
kernels = torch.ops.sgmim_fast_cpu

# rows, ins, outs: parts of tiles, panels and transposed blocks; several chunks of rows; panels that are packed one by
# one and together; depths of several blocks
SHAPES = [
    *((1, 2, 1), (7, 6, 3), (6, 32, 64), (13, 34, 65), (241, 70, 130), (500, 128, 200), (482, 768, 500)),
    *((30, 1026, 70), (250, 2100, 130), (0, 4, 3)),
]


def result(rows: int, outs: int, dtype: torch.dtype = LOW) -> Tensor:
    return torch.full((rows, outs), torch.nan, dtype=dtype)


@pytest.fixture(params=[torch.float32, LOW], ids=lambda dtype: f"weights {dtype}")
def weights(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("out", [LOW, torch.float32], ids=str)
def test_fprop(shape, weights, bias, out):
    rows, ins, outs = shape
    x, weight = torch.randn(rows, ins).to(LOW), torch.randn(outs, ins).to(weights)
    shift, residual = torch.randn(outs) if bias else None, torch.randn(rows, outs).to(out) if bias else None
    y = result(rows, outs, out)
    kernels.linear_bf16(x, weight, False, shift, residual, y)
    plain = F.linear(x, weight.to(LOW), None if shift is None else shift.to(LOW))
    truth = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    if residual is not None:
        plain, truth = plain + residual, truth + residual.double()
    assert_close_to_truth(y, plain, truth, "y")
    if weights == LOW and out == torch.float32:  # nothing is rounded: as exact as float32 itself
        exact = F.linear(x.float(), weight.float(), shift)
        assert_close_to_truth(y, exact if residual is None else exact + residual, truth, "y unrounded")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dgrad(shape, weights):
    rows, outs, ins = shape
    dy, weight = torch.randn(rows, outs).to(LOW), torch.randn(outs, ins).to(weights)
    dx = result(rows, ins)
    kernels.linear_bf16(dy, weight, True, None, None, dx)
    assert_close_to_truth(dx, dy @ weight.to(LOW), dy.double() @ weight.double(), "dx")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_is_that_of_what_is_saved(shape, weights):
    rows, ins, outs = shape
    x, weight, bias = torch.randn(rows, ins).to(LOW), torch.randn(outs, ins).to(weights), torch.randn(outs)
    hidden, activated, y = result(rows, outs), result(rows, outs), result(rows, outs)
    kernels.linear_gelu_bf16(x, weight, bias, hidden, activated)
    kernels.linear_bf16(x, weight, False, bias, None, y)
    assert torch.equal(hidden, y)
    again = torch.empty_like(hidden)
    kernels.gelu(hidden, again)
    assert torch.equal(activated, again)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dgrad_through_gelu(shape, weights):
    rows, outs, ins = shape
    dy, weight = torch.randn(rows, outs).to(LOW), torch.randn(outs, ins).to(weights)
    hidden = torch.randn(rows, ins).to(LOW)
    dhidden, activated, sums = result(rows, ins), result(rows, ins), torch.full((ins,), torch.nan)
    kernels.dgrad_gelu_bf16(dy, weight, hidden, dhidden, activated, sums)

    def through(dtype: torch.dtype) -> Tensor:
        h = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad(F.gelu(h), h, dy.to(dtype) @ weight.to(LOW).to(dtype))[0]

    # the weights' own rounding is in the truth: what is tested is the rest
    assert_close_to_truth(dhidden, through(LOW), through(torch.float64), "dhidden")
    assert_close_to_truth(sums, through(LOW).float().sum(0), through(torch.float64).sum(0), "sums")
    again = torch.empty_like(hidden)
    kernels.gelu(hidden, again)
    assert torch.equal(activated, again)


def test_any_number_of_threads_gives_the_same_bits(weights):
    x, weight, hidden = (torch.randn(size) for size in ((500, 96), (200, 96), (500, 96)))
    dy, weight, hidden = torch.randn(500, 200).to(LOW), weight.to(weights), hidden.to(LOW)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, dx, activated, sums = result(500, 200), result(500, 96), result(500, 96), torch.empty(96)
            kernels.linear_bf16(x.to(LOW), weight, False, None, None, y)
            kernels.dgrad_gelu_bf16(dy, weight, hidden, dx, activated, sums)
            found.append((y, dx, activated, sums))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_float32_weights_are_rounded_as_a_copy_is():
    x, weight, y, again = torch.randn(50, 64).to(LOW), torch.randn(70, 64), result(50, 70), result(50, 70)
    kernels.linear_bf16(x, weight, False, None, None, y)
    kernels.linear_bf16(x, weight.to(LOW), False, None, None, again)
    assert torch.equal(y, again)


@pytest.mark.parametrize("ins", [63, 64], ids=["odd", "even"])
@pytest.mark.parametrize("residual", [None, torch.float64, torch.float32, LOW], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, LOW, torch.float64], ids=str)
def test_linear_gives_the_dtypes_of_the_library_call(ins, residual, dtype):
    x, weight, bias = torch.randn(9, ins).to(LOW), torch.randn(5, ins), torch.randn(5)
    added = None if residual is None else torch.randn(9, 5).to(residual)
    actual = cpu_gemm.linear(x, weight, bias, residual=added, dtype=dtype)
    expected = gemm.linear(x, weight.to(LOW), bias, residual=added, dtype=dtype)
    truth = F.linear(x.double(), weight.double(), bias.double()) + (0 if added is None else added.double())
    assert actual.dtype == expected.dtype
    assert_close_to_truth(actual, expected, truth)


def test_weights_are_not_copied(monkeypatch):
    weight, bias = torch.randn(4, 6), torch.randn(4)
    for last in (False, True):
        found = cpu_gemm.weights_in(LOW, weight, bias, None, last=last)
        assert found[0].data_ptr() == weight.data_ptr() and found[1].data_ptr() == bias.data_ptr() and found[2] is None
    monkeypatch.setattr(cpu_gemm, "reads_float32_weights", lambda: False)
    assert [t.dtype for t in cpu_gemm.weights_in(LOW, weight, bias)] == [LOW, LOW]


def test_an_amx_machine_takes_the_library(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not cpu_gemm.reads_float32_weights.__wrapped__()

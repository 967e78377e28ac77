"""fprop and dgrad of csrc/cpu/linear.cpp, their epilogues, and the conditions for their use."""

from __future__ import annotations

import pytest
import torch
from checks import AGAIN, assert_close_to_truth, assert_passes_with, moved
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import backends
from sgmim_fast.ops import gemm
from sgmim_fast.ops.cpu import gemm as cpu_gemm

NATIVE = backends.available()["cpu"]
LOW, WIDE = torch.bfloat16, torch.float32
ISA = torch.ops.sgmim_fast_cpu.isa() if NATIVE[0] else ""
pytestmark = [
    pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1]),
    pytest.mark.skipif(not ISA.startswith("avx512"), reason="needs AVX-512, not lowered"),
]
needs_bfloat16 = pytest.mark.skipif(ISA != "avx512bf16", reason="needs AVX512-BF16, not lowered")
kernels = torch.ops.sgmim_fast_cpu

# rows, ins, outs: partial tiles, panels and transposed blocks; several chunks of rows; panels packed one by one and
# together; several blocks along the depth
SHAPES = [
    *(
        (1, 2, 1),
        (7, 6, 3),
        (6, 32, 64),
        (13, 34, 65),
        (241, 70, 130),
        (500, 128, 200),
        (482, 768, 500),
        (4000, 34, 65),
    ),
    *((30, 1026, 70), (250, 2100, 130), (0, 4, 3)),
]


def result(rows: int, outs: int, dtype: torch.dtype = LOW) -> Tensor:
    return torch.full((rows, outs), torch.nan, dtype=dtype)


@pytest.fixture(
    params=[
        pytest.param((LOW, WIDE), marks=needs_bfloat16),
        pytest.param((LOW, LOW), marks=needs_bfloat16),
        (WIDE, WIDE),
    ],
    ids=lambda dtypes: f"{dtypes[0]}, weights {dtypes[1]}",
)
def dtypes(request):
    """Returns the dtypes of rows and weights."""
    return request.param


def rounded(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(sizes).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scale"])
def test_fprop(shape, dtypes, bias, scaled):
    (rows, ins, outs), (of_x, of_weight) = shape, dtypes
    x, weight = rounded((rows, ins), of_x), rounded((outs, ins), of_weight)
    offset, scale = torch.randn(outs) if bias else None, torch.randn(outs) if scaled else None
    for out in {of_x, WIDE}:
        residual, y = rounded((rows, outs), out) if bias else None, result(rows, outs, out)
        kernels.linear(x, weight, False, offset, scale, residual, y)
        inputs = x, weight, offset, scale, residual
        truth = fprop(torch.float64, *(None if t is None else t.double() for t in inputs))
        again = lambda inputs=inputs: (fprop(of_x, *moved(inputs, of_x)) for _ in range(AGAIN))  # noqa: E731
        assert_close_to_truth(y, fprop(of_x, *inputs), truth, "y", again)
        if of_weight == LOW and out == WIDE:  # nothing is rounded, so results are as accurate as float32
            assert_close_to_truth(y, fprop(WIDE, *inputs), truth, "y unrounded")


def fprop(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The linear layer in plain PyTorch, in `dtype`."""
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    y = y if scale is None else (y * scale).to(dtype)
    return y if residual is None else y + residual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dgrad(shape, dtypes):
    (rows, outs, ins), (of_dy, of_weight) = shape, dtypes
    dy, weight = rounded((rows, outs), of_dy), rounded((outs, ins), of_weight)
    dx = result(rows, ins, of_dy)
    kernels.linear(dy, weight, True, None, None, None, dx)
    assert_close_to_truth(dx, dy @ weight.to(of_dy), dy.double() @ weight.double(), "dx")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_is_that_of_what_is_saved(shape, dtypes):
    (rows, ins, outs), (of_x, of_weight) = shape, dtypes
    x, weight, bias = rounded((rows, ins), of_x), rounded((outs, ins), of_weight), torch.randn(outs)
    hidden, activated, y = (result(rows, outs, of_x) for _ in range(3))
    kernels.linear_gelu(x, weight, bias, hidden, activated)
    kernels.linear(x, weight, False, bias, None, None, y)
    assert torch.equal(hidden, y)
    again = torch.empty_like(hidden)
    kernels.gelu(hidden, again)
    assert torch.equal(activated, again)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dgrad_through_gelu(shape, dtypes):
    (rows, outs, ins), (of_dy, of_weight) = shape, dtypes
    dy, weight, hidden = rounded((rows, outs), of_dy), rounded((outs, ins), of_weight), rounded((rows, ins), of_dy)
    dhidden, activated, sums = result(rows, ins, of_dy), result(rows, ins, of_dy), torch.full((ins,), torch.nan)
    kernels.dgrad_gelu(dy, weight, hidden, dhidden, activated, sums)

    def through(dtype: torch.dtype) -> Tensor:
        h = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad(F.gelu(h), h, dy.to(dtype) @ weight.to(of_dy).to(dtype))[0]

    # The truth uses rounded weights, so the rounding of weights is not tested.
    assert_close_to_truth(dhidden, through(of_dy), through(torch.float64), "dhidden")
    assert_close_to_truth(sums, through(of_dy).float().sum(0), through(torch.float64).sum(0), "sums")
    again = torch.empty_like(hidden)
    kernels.gelu(hidden, again)
    assert torch.equal(activated, again)


@pytest.mark.parametrize(
    ("rows", "ins", "outs"), [(500, 96, 200), (1200, 64, 70), (20000, 34, 70)], ids=["panels", "narrow", "rows"]
)
def test_any_number_of_threads_gives_the_same_bits(dtypes, rows, ins, outs):
    """Each thread has its own panels, or its own rows."""
    of_x, of_weight = dtypes
    x, weight, bias = rounded((rows, ins), of_x), rounded((outs, ins), of_weight), torch.randn(outs)
    residual, pre_activation = rounded((rows, outs), of_x), rounded((rows, outs), of_x)
    dy, transposed = rounded((rows, ins), of_x), rounded((ins, outs), of_weight)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, hidden, activated, dx, again = (result(rows, outs, of_x) for _ in range(5))
            sums = torch.empty(outs)
            kernels.linear(x, weight, False, bias, None, residual, y)
            kernels.linear_gelu(x, weight, bias, hidden, activated)
            kernels.dgrad_gelu(dy, transposed, pre_activation, dx, again, sums)
            found.append((y, hidden, activated, dx, again, sums))
    finally:
        torch.set_num_threads(before)
    assert not any(t.isnan().any() for t in found[0])
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


@needs_bfloat16
def test_float32_weights_are_rounded_as_a_copy_is():
    x, weight, y, again = rounded((50, 64), LOW), torch.randn(70, 64), result(50, 70), result(50, 70)
    kernels.linear(x, weight, False, None, None, None, y)
    kernels.linear(x, weight.to(LOW), False, None, None, None, again)
    assert torch.equal(y, again)


@pytest.mark.parametrize("kind", [LOW, WIDE], ids=str)
@pytest.mark.parametrize("ins", [63, 64], ids=["odd", "even"])
@pytest.mark.parametrize("residual", [None, torch.float64, WIDE, LOW], ids=str)
@pytest.mark.parametrize("dtype", [None, WIDE, LOW, torch.float64], ids=str)
def test_the_dtypes_are_those_of_the_library_call(kind, ins, residual, dtype):
    x, weight, bias = rounded((200, ins), kind), torch.randn(5, ins), torch.randn(5)
    added = None if residual is None else rounded((200, 5), residual)
    actual = cpu_gemm.linear(x, weight, bias, residual=added, dtype=dtype)
    expected = gemm.linear(x, weight.to(kind), bias, residual=added, dtype=dtype)
    truth = F.linear(x.double(), weight.double(), bias.double()) + (0 if added is None else added.double())
    assert actual.dtype == expected.dtype
    assert_close_to_truth(actual, expected, truth)
    dy = rounded((200, 5 if ins == 63 else 6), kind)
    weight = torch.randn(dy.shape[1], ins)
    dx = cpu_gemm.dgrad(dy, weight, dtype=dtype)
    assert dx.dtype == (dtype or kind)
    assert_close_to_truth(dx, (dy @ weight.to(kind)).to(dtype or kind), dy.double() @ weight.double())


@needs_bfloat16
def test_weights_are_not_copied(monkeypatch):
    weight, bias = torch.randn(4, 6), torch.randn(4)
    for last in (False, True):
        found = cpu_gemm.weights_in(LOW, weight, bias, None, last=last)
        assert found[0].data_ptr() == weight.data_ptr() and found[1].data_ptr() == bias.data_ptr() and found[2] is None
    monkeypatch.setattr(cpu_gemm, "reads_float32_weights", lambda: False)
    assert [t.dtype for t in cpu_gemm.weights_in(LOW, weight, bias)] == [LOW, LOW]


def test_lower_instruction_sets():
    assert_passes_with(["avx512"], __file__, "(500 or 250) and not same_bits")


def test_an_amx_machine_takes_the_library(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not cpu_gemm.reads_float32_weights.__wrapped__()

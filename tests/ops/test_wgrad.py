"""The wgrad of csrc/cpu/wgrad.cpp, for every instruction set."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close_to_truth, assert_passes_with
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops.cpu import gemm

NATIVE = backends.available()["cpu"]
pytestmark = pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])
ISA = torch.ops.sgmim_fast_cpu.isa() if NATIVE[0] else ""

# rows, columns of dy and of x: single ones, partial tiles and panels, and more rows than are packed at a time
SHAPES = [(0, 3, 5), (4, 0, 5), (4, 3, 0), (1, 1, 1), (7, 5, 3), (16, 6, 64), (33, 97, 130), (353, 100, 70)]
SHAPES += [(1025, 12, 33), (4301, 7, 17), (4301, 7, 450), (2049, 401, 9)]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    if request.param == torch.bfloat16 and ISA != "avx512bf16":
        pytest.skip("needs AVX512-BF16")
    return request.param


def wgrad(dy: Tensor, x: Tensor) -> Tensor:
    dw = torch.full((dy.shape[1], x.shape[1]), torch.nan)
    torch.ops.sgmim_fast_cpu.wgrad(dy, x, dw)
    return dw


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(dtype, shape):
    rows, outs, ins = shape
    dy, x = torch.randn(rows, outs).to(dtype), torch.randn(rows, ins).to(dtype)
    plain = dy.float().t() @ x.float()
    assert_close_to_truth(wgrad(dy, x), plain, dy.double().t() @ x.double(), "dw")


@pytest.mark.parametrize(("outs", "ins"), [(200, 90), (90, 200), (128, 16), (500, 333), (70, 500)])
def test_any_number_of_threads_gives_the_same_bits(dtype, outs, ins):
    """Each thread has its own columns of dy, or of x, and packs the other operand alone if they are many."""
    dy, x = torch.randn(2500, outs).to(dtype), torch.randn(2500, ins).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(wgrad(dy, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_not_a_number_stays_in_its_row_and_column(dtype):
    dy, x = torch.randn(40, 9).to(dtype), torch.randn(40, 70).to(dtype)
    expected = wgrad(dy, x)
    dy[3, 4] = torch.nan
    actual = wgrad(dy, x)
    assert actual[4].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("rows", [gemm.MANY_ROWS - 1, gemm.MANY_ROWS])
def test_chosen_for_many_rows_where_the_librarys_is_slow(monkeypatch, rows, slow):
    calls = []
    monkeypatch.setattr(gemm, "_in_float32", lambda: slow)
    monkeypatch.setattr(torch.ops.sgmim_fast_cpu, "wgrad", lambda *args: calls.append(args))
    gemm.wgrad(torch.randn(rows, 3), torch.randn(rows, 2))
    assert len(calls) == (slow and rows >= gemm.MANY_ROWS)


def test_lower_instruction_sets():
    assert_passes_with(["baseline", "avx2", "avx512"], __file__)

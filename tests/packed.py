"""Precisions, comparisons with float64 and checks of reproducibility, for the tests of ops on visible cells."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from calls import Call
from checks import assert_all_close_to_truth, gradients, in_dtype
from torch import Tensor

from sgmim_fast.ops import _plain, gemm
from sgmim_fast.ops.cpu import primitives


class Precision(NamedTuple):
    """The dtype of an op, and the dtype in which a CPU computes bfloat16 gemms (`gemm.compute_bfloat16_in`)."""

    dtype: torch.dtype
    compute: torch.dtype


PRECISIONS = [
    pytest.param(Precision(torch.float32, torch.float32), id="float32"),
    pytest.param(Precision(torch.bfloat16, torch.bfloat16), id="bfloat16"),
    pytest.param(Precision(torch.bfloat16, torch.float32), id="bfloat16-in-float32"),
]
HALF = pytest.param(Precision(torch.float16, torch.bfloat16), id="float16")  # the C++ CPU kernels do not support it


def on(device: torch.device, inputs: Sequence[Any]) -> list[Any]:
    """Moves every tensor of the inputs to the device."""
    return [t.to(device) if isinstance(t, Tensor) else t for t in inputs]


def computed(
    function: Callable[[Any], Tensor], call: Call, cotangent: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Returns result and gradients of a function of the op's arguments."""
    tensors = call.tensors if dtype is None else in_dtype(call.tensors, dtype)
    result, grads = gradients(call.by(function), tensors, cotangent)
    return [result, *grads]


def assert_draws_close_to_truth(
    draw: Callable[[], Call], ours: Callable[[Any], Tensor], plain: Callable[[Any], Tensor],
    cotangent_of: Callable[[Call], Tensor], precision: Precision,
    *, result: torch.dtype | None = None, autocast: Any = None, draws: int = 4,
) -> None:  # fmt: skip
    """Calls `assert_all_close_to_truth` with the stacked results and gradients of several draws, because the error of
    plain PyTorch for one small tensor may be small by chance.

    Args:
        draw: returns a call with random numbers.
        ours, plain: functions of the op's arguments.
        cotangent_of: returns the gradient of the result of a call.
        precision: compute dtype of CPUs, and the expected dtype of the result unless `result` is given.
        autocast: context in which the functions run.
    """
    columns: list[list[list[Tensor]]] = [[], [], []]
    for _ in range(draws):
        call = draw()
        cotangent = cotangent_of(call)
        with gemm.compute_bfloat16_in(precision.compute), autocast or contextlib.nullcontext():
            actual, usual = (computed(function, call, cotangent) for function in (ours, plain))
        assert [t.dtype for t in actual] == [result or precision.dtype, *(t.dtype for t in call.tensors)]
        usual[0] = usual[0].to(actual[0].dtype)
        for column, found in zip(
            columns, (actual, usual, computed(plain, call, cotangent, torch.float64)), strict=True
        ):
            column.append(found)
    stacked = ([torch.stack(t) for t in zip(*column, strict=True)] for column in columns)
    assert_all_close_to_truth(*stacked, ["result", *call.names])


def assert_same_bits(results: Sequence[Any], name: str = "") -> None:
    """Asserts that every nested sequence of tensors equals the first one bit for bit; NaN is not equal to NaN."""
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, msg=lambda text: f"{name}: {text}")


def assert_same_bits_on_any_threads(
    call: Call, cotangent: Tensor, precision: Precision, backend: str, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asserts that repeated runs give the same bits, and that our own kernels do so for any number of threads."""
    results = []
    with gemm.compute_bfloat16_in(precision.compute):
        for number in (1, 2):
            with threads(number):
                assert_same_bits([gradients(call, call.tensors, cotangent) for _ in range(3)])
        with library_products_on_one_thread(monkeypatch):
            for number in (1, 2, 3):
                with threads(number):
                    results.append(gradients(call, call.tensors, cotangent))
    if backend == "cpu":  # in other backends, only the library's gemms use these threads
        assert_same_bits(results)


@contextlib.contextmanager
def library_products_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the library's gemms on one thread: their order of summation may depend on the number of threads. Our
    kernels' may not."""

    def on_one_thread(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Tensor, **options: Any) -> Tensor:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            result = product(*arguments, **options)
            torch.set_num_threads(threads)
            return result

        return call

    with monkeypatch.context() as patch:
        for module in (gemm, _plain, primitives):
            for name in ("linear", "dgrad", "wgrad"):
                if hasattr(module, name):
                    patch.setattr(module, name, on_one_thread(getattr(module, name)))
        yield

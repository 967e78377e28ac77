"""Packed rows, weights and precisions for the tests of the ops that work on visible cells."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from checks import assert_all_close_to_truth
from torch import Tensor

from sgmim_fast import Rows
from sgmim_fast.ops import _plain, gemm
from sgmim_fast.ops.cpu import primitives


class Precision(NamedTuple):
    """What an op is asked for, and what a CPU multiplies a bfloat16 request in (`gemm.compute_bfloat16_in`)."""

    dtype: torch.dtype
    compute: torch.dtype


PRECISIONS = [
    pytest.param(Precision(torch.float32, torch.float32), id="float32"),
    pytest.param(Precision(torch.bfloat16, torch.bfloat16), id="bfloat16"),
    pytest.param(Precision(torch.bfloat16, torch.float32), id="bfloat16-in-float32"),
]
HALF = pytest.param(Precision(torch.float16, torch.bfloat16), id="float16")  # not in C++ on the CPU


def chosen(counts: Sequence[int], cells: int) -> Tensor:
    """(images, cells) bool with exactly `counts` random entries True in each image."""
    wanted = torch.zeros(len(counts), cells, dtype=torch.bool)
    for image, count in zip(wanted, counts, strict=True):
        image[torch.randperm(cells)[:count]] = True
    return wanted


def rows_of(wanted: Tensor) -> Rows:
    """Row list of the True entries of (images, cells)."""
    offsets = torch.zeros(wanted.shape[0] + 1, dtype=torch.int64)
    offsets[1:] = wanted.sum(1).cumsum(0)
    return Rows(wanted.flatten().nonzero().squeeze(1), offsets)


def matrix(*shape: int) -> Tensor:
    """float64 weight, scaled so that a gemm keeps the size of its input."""
    return torch.randn(shape, dtype=torch.float64) / math.sqrt(math.prod(shape[1:]))


def norm_weight(width: int) -> Tensor:
    return 1 + 0.1 * torch.randn(width, dtype=torch.float64)


def bias(width: int) -> Tensor:
    return 0.1 * torch.randn(width, dtype=torch.float64)


def on(device: torch.device, inputs: Sequence[Any]) -> list[Any]:
    """The inputs with every tensor on the device."""
    return [t.to(device) if isinstance(t, Tensor) else t for t in inputs]


def assert_draws_close_to_truth(
    draw: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]],
    names: Sequence[str],
    draws: int = 4,
) -> None:
    """`assert_all_close_to_truth` of several draws as one, since plain PyTorch may be lucky with a small tensor.

    `draw()` makes inputs at random and returns what the op, plain PyTorch and the truth make of them.
    """
    columns = zip(*(draw() for _ in range(draws)), strict=True)
    assert_all_close_to_truth(*([torch.stack(t) for t in zip(*column, strict=True)] for column in columns), names)


def assert_same_bits(results: Sequence[Any]) -> None:
    """Every nested sequence of tensors equals the first, NaN included in what differs."""
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@contextlib.contextmanager
def library_products_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library may sum a gemm's terms in another order on more threads; what we write may not."""

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

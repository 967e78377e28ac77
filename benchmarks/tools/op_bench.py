"""What the benchmarks of single ops share: one way to time a column, after it was held against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tools.agree import assert_agree
from torch import Tensor

from sgmim_fast import backends

BATCH = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("torch", "cpu")


def compare(
    benchmark: Any,
    op: str,
    name: str,
    group: str,
    dtype: torch.dtype,
    run: Callable[..., list[Tensor]],
    fused: Callable[..., Tensor],
    **plain: Callable[..., Tensor],
) -> None:
    """Times one column: plain PyTorch, or a backend of an op whose results and gradients agree with the first of those.

    Args:
        name: of the column: one of `plain`, or a backend.
        group: which columns stand together.
        dtype: of the column.
        run: takes a function, and a dtype where it is another one than the column's; returns results and gradients.
    """
    benchmark.group = f"{op} {group}, B = {BATCH}"
    if name in plain:
        benchmark(run, plain[name])
        return
    if not (usable := backends.can_run(op, name))[0]:
        pytest.skip(usable[1])
    truth = next(iter(plain.values()))
    with backends.use(name):
        assert_agree(run(fused), run(truth), run(truth, torch.float32), dtype)
        benchmark(run, fused)


def forward_backward(dtype: torch.dtype, leaves: list[Tensor], cotangent: Tensor | None = None) -> Callable[..., Any]:
    """`run` of a function without arguments: its result in float32 and the leaves' gradients, under autocast.

    Args:
        cotangent: gradient of the result; None: of a loss.
    """

    def run(function: Callable[[], Tensor], dtype: torch.dtype = dtype) -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = function()
        given = None if cotangent is None else cotangent.to(y.dtype)
        return [y.detach().float(), *torch.autograd.grad(y, leaves, given)]

    return run

"""GELU and its derivative as elementwise kernels, the epilogues of the library's gemms.

GELU is exact, with erf by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7, below GELU's resolution in float32). One
exponential and one reciprocal serve the function and its derivative, half the instructions of libdevice's erf. On an
H200 these decide: as the epilogue of a gemm in Triton, libdevice's erf took longer than the gemm itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import cast, gelu, gelu_both
from sgmim_fast.kernels.launch import cdiv, launch, programs_of_rows
from sgmim_fast.kernels.sums import MOST_ADDED

FLAT = 2048  # elements per program of the forward
ROWS, COLUMNS = 2, 1024  # tile of a program of the backward: the fastest of 14 settings measured on an H200


@triton.jit
def _gelu_forward_kernel(pre_activation, activated, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pre_activation + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(activated + at, cast(gelu(x), activated.dtype.element_ty), mask=at < count)


def gelu_forward(pre_activation: Tensor) -> Tensor:
    """Returns gelu(pre_activation) of a contiguous tensor. Cost: reads it once, writes as much; 1 launch."""
    activated = torch.empty_like(pre_activation)
    count = pre_activation.numel()
    launch(_gelu_forward_kernel, (cdiv(count, FLAT),), pre_activation, activated, count, BLOCK=FLAT)
    return activated


@triton.jit
def _gelu_backward_kernel(
    grad, pre_activation, activated, partials, rows, width, per_program, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum((program + 1) * per_program, rows)
    for first in range(program * per_program, last, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(pre_activation + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        y, slope = gelu_both(x)
        tl.store(activated + at, cast(y, activated.dtype.element_ty), mask=inside)
        dy *= slope
        tl.store(grad + at, cast(dy, grad.dtype.element_ty), mask=inside)
        total += dy
    tl.store(partials + program.to(tl.int64) * width + column, tl.sum(total, 0), mask=column < width)


def gelu_backward(grad: Tensor, pre_activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx = grad * gelu'(pre_activation), in place of grad, gelu(pre_activation), and partial sums of dx.

    Cost: reads two (rows, width) tensors and writes two; 1 launch.
    """
    rows, width = pre_activation.shape
    activated = torch.empty_like(pre_activation)
    per_program, programs = programs_of_rows(
        rows, width, pre_activation.device, most=ROWS * MOST_ADDED, columns=COLUMNS, programs=32
    )
    partials = torch.empty(programs, width, dtype=torch.float32, device=pre_activation.device)
    launch(
        _gelu_backward_kernel, (cdiv(width, COLUMNS), programs), grad, pre_activation, activated, partials, rows, width,
        per_program, ROWS=ROWS, BLOCK=COLUMNS,
    )  # fmt: skip
    return grad, activated, partials

"""What every launcher needs: the device guard, the number of programs, and what the interpreter changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops.target import listener, target

INTERPRETED = backends.triton_interpreted()  # Triton looks at the same moment, where a kernel is defined

MOST_COLUMNS = 1 << 14  # of a row that one program holds in its registers


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: `triton.cdiv` in a tenth of its time on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """`triton.next_power_of_2`, likewise."""
    return 1 << (n - 1).bit_length()


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `function` with the device of its first tensor as the current one, which is where Triton launches."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if not first.is_cuda:
            return function(*args)
        with torch.cuda.device(first.device):
            return function(*args)

    return guarded


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches the kernel, unless there is nothing to do."""
    if not all(grid):
        return
    if caught := listener():
        caught(kernel, grid, args, options)
    else:
        kernel[grid](*args, **options)


def rows_per_program(count: int, device: torch.device, least: int = 8) -> int:
    """Rows each program goes through where it sums over rows: two programs per multiprocessor, whatever the load."""
    return max(least, cdiv(count, 2 * target(device).multiprocessors))


def programs_of_rows(rows: int, width: int, device: torch.device, most: int) -> tuple[int, int]:
    """Rows of a program, a multiple of 32 and at most `most`, and programs along the rows, where each has 256 columns:
    so many that all of them together are about 16 for each multiprocessor.
    """
    wanted = max(1, 16 * target(device).multiprocessors // cdiv(width, 256))
    each = min(cdiv(max(1, cdiv(rows, wanted)), 32) * 32, most)
    return each, max(1, cdiv(rows, each))


def tf32() -> str:
    """How float32 operands are multiplied: exactly, unless the user allows tf32 as for PyTorch's own gemms."""
    # what the library itself looks at; `allow_tf32` raises once `fp32_precision` was set, which knows of both
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

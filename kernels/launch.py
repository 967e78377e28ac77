"""What every launcher needs: the device guard, the number of programs, and what the interpreter changes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from sgmim_fast import backends

INTERPRETED = backends.triton_interpreted()  # Triton looks at the same moment, where a kernel is defined

MOST_COLUMNS = 1 << 14  # of a row that one program holds in its registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `function` with the device of its first tensor as the current one, which is where Triton launches."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return function(*args)

    return guarded


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches the kernel, unless there is nothing to do."""
    if all(grid):
        kernel[grid](*args, **options)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def rows_per_program(count: int, device: torch.device, least: int = 8) -> int:
    """Rows each program goes through where it sums over rows: two programs per multiprocessor, whatever the load."""
    return max(least, triton.cdiv(count, 2 * _multiprocessors(device)))


def supported(dtype: torch.dtype, compute: torch.dtype) -> tuple[bool, str]:
    """Whether the kernels take a request for `dtype` that is computed in `compute`, and the reason where not."""
    if dtype not in DTYPES:
        return False, f"dtype {dtype}; the Triton kernels take float32, bfloat16 and float16"
    if INTERPRETED and compute == torch.bfloat16:
        return False, "Triton's interpreter multiplies bfloat16 wrongly"
    return True, ""


def fits(*widths: int) -> tuple[bool, str]:
    """Whether rows of these widths fit into one program, and the reason where not."""
    widest = max(widths)
    return widest <= MOST_COLUMNS, f"rows of {widest} numbers; the Triton kernels hold {MOST_COLUMNS} in registers"


def cast_all(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors, contiguous and in `dtype`, by one launch for all that are not."""
    wrong = [i for i, t in enumerate(tensors) if t.dtype != dtype]
    result = [t.contiguous() for t in tensors]
    if wrong:
        copies = [torch.empty_like(result[i], dtype=dtype) for i in wrong]
        torch._foreach_copy_(copies, [result[i].detach() for i in wrong])
        for i, copy in zip(wrong, copies, strict=True):
            result[i] = copy
    return result


def tf32() -> str:
    """How float32 operands are multiplied: exactly, unless the user allows tf32 as for PyTorch's own products."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"

"""What every launcher needs: the device guard, the number of programs, and what the interpreter changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from triton.runtime import driver

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
    elif INTERPRETED:
        kernel[grid](*args, **options)
    else:
        run(kernel, grid, args, options)


# id of a kernel, device, options and what Triton may specialize in -> the kernel, compiled, and arguments from options
_compiled: dict[tuple[Any, ...], tuple[Any, Any, list[Any]]] = {}
_MOST_COMPILED = 4096  # lists of rows may be of any length


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launches `kernel` (a `triton.JITFunction`), compiled where no launch like this one was there before.

    `kernel[grid](...)` binds arguments and looks for what it has compiled anew at every launch, which takes 15 to 65 us
    of the host; to find it here 5. Launching what is compiled, `compiled[grid](...)`, is Triton's.
    """
    key = id(kernel), driver.active.get_current_device(), *options.items(), *map(_specialized, args)
    found = _compiled.get(key)
    if found is None:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        compiled, others = kernel[grid](*args, **options), list(kernel.signature.parameters.values())[len(args) :]
        _compiled[key] = kernel, compiled, [options.get(p.name, p.default) for p in others]
        return
    _, compiled, rest = found
    compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _specialized(value: Any) -> Any:
    """At least all of an argument that Triton compiles for: dtype and alignment of a tensor, the type of a float, a
    value of any other kind."""
    kind = type(value)
    if kind is Tensor or kind is Parameter:
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "unaligned")
    if kind is int or value is None:
        return value
    if isinstance(value, tuple):
        return tuple([_specialized(entry) for entry in value])
    return kind if kind is float else (kind, value)


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

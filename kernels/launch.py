"""Helpers of every launcher: the device guard, the launch itself, and numbers of programs."""

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

INTERPRETED = backends.triton_interpreted()  # Triton reads its variable at the same time, when a kernel is defined

MOST_COLUMNS = 1 << 14  # longest row that one program holds in registers


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up: `triton.cdiv` in a tenth of its time on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """`triton.next_power_of_2`, faster on the host."""
    return 1 << (n - 1).bit_length()


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: makes the device of the first tensor current, as Triton launches on the current device."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if not first.is_cuda:
            return function(*args)
        with torch.cuda.device(first.device):
            return function(*args)

    return guarded


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches the kernel unless the grid is empty, or passes the launch to `target.listener`."""
    if not all(grid):
        return
    if caught := listener():
        caught(kernel, grid, args, options)
    elif INTERPRETED:
        kernel[grid](*args, **options)
    else:
        run(kernel, grid, args, options)


# (id of a kernel, device, options, specialised arguments) -> the kernel, its compilation, and the arguments from
# options
_compiled: dict[tuple[Any, ...], tuple[Any, Any, list[Any]]] = {}
_MOST_COMPILED = 4096  # lists of rows may have any length


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launches `kernel` (a `triton.JITFunction`), and compiles it if no launch like this one came before.

    At every launch `kernel[grid](...)` binds the arguments and looks up the compilation, which takes the host 15 to 65
    us; the look-up here takes 5. `compiled[grid](...)`, which launches a compilation, is Triton's.
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
    """Returns at least what Triton specialises on: dtype and alignment of a tensor, the type of a float, the value of
    any other argument."""
    kind = type(value)
    if kind is Tensor or kind is Parameter:
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "unaligned")
    if kind is int or value is None:
        return value
    if isinstance(value, tuple):
        return tuple([_specialized(entry) for entry in value])
    return kind if kind is float else (kind, value)


def programs_of_rows(
    rows: int, width: int, device: torch.device, *, most: int, columns: int, programs: int = 16
) -> tuple[int, int]:
    """Returns the rows of each program, a multiple of 32 and at most `most`, and the number of programs along the rows,
    each with `columns` columns, so that there are about `programs` programs per multiprocessor.
    """
    wanted = max(1, programs * target(device).multiprocessors // cdiv(width, columns))
    each = min(cdiv(max(1, cdiv(rows, wanted)), 32) * 32, most)
    return each, max(1, cdiv(rows, each))


def tf32() -> str:
    """Returns the precision of float32 gemms: exact, unless the user allows tf32 for PyTorch's own gemms."""
    # The setting that PyTorch itself reads. `allow_tf32` raises once `fp32_precision` has been set, which covers both.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

"""Checks of arguments that several ops share. Each error names the argument, its actual and the expected value.

The checks read shapes, dtypes, layouts and devices, never values, so that none synchronises. The exceptions are `rows`
and `image_rows`, which read the values of CPU tensors outside of any dispatch mode; on a GPU the kernels stay inside
their tensors for any index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def shape(name: str, tensor: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """Raises ValueError unless the shape is as expected; None matches any size. `meaning`: "(rows, channels)"."""
    actual = tuple(tensor.shape)
    fits = len(actual) == len(expected) and all(e is None or a == e for a, e in zip(actual, expected, strict=True))
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {actual}; expected {meaning} = ({wanted})")


def floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is of a floating-point dtype."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")


def parameter(name: str, tensor: Tensor | None, expected: Sequence[int | None], meaning: str) -> None:
    """Applies `floating` and `shape` to an argument unless it is None."""
    if tensor is not None:
        floating(name, tensor)
        shape(name, tensor, expected, meaning)


def named(arg: Any) -> str:
    """Returns what an argument of a wrong type is, for messages."""
    return "None" if arg is None else f"a {type(arg).__name__}"


def pair(name: str, value: Any) -> list[int]:
    """Returns a pair of sizes as a list. Raises TypeError unless it is a list or tuple."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is {named(value)}; expected two integers")
    return list(value)


def data(name: str, tensor: Any, what: str) -> None:
    """Raises ValueError for a tensor that requires a gradient, which `what` does not compute."""
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad; expected data: {what} is not differentiable, detach() it")


def index(name: str, tensor: Tensor) -> None:
    """Raises unless the tensor is a one-dimensional int64 tensor."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected torch.int64")
    if tensor.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one dimension")


def same_device(tensors: Iterable[tuple[str, Tensor]]) -> torch.device:
    """Returns the device of all tensors. Raises ValueError if devices differ, TypeError for a sparse layout."""
    device = None
    for name, tensor in tensors:
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, where the other arguments are")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}; expected torch.strided")
    return device


def same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor, cast: torch.dtype | None) -> None:
    """Raises TypeError if the dtypes differ and autocast does not `cast` both, as for `F.linear`."""
    if cast is None and tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {tensor.dtype} and {other_name} {other.dtype}; expected the same outside of autocast"
        )


def cells(name: str, pixels: Tensor, cell: int) -> None:
    """Raises ValueError unless `pixels` is (B, C, H, W) with H and W multiples of `cell`."""
    if cell < 1:
        raise ValueError(f"cell is {cell}; expected at least 1")
    if pixels.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(pixels.shape)}; expected (B, C, H, W)")
    height, width = pixels.shape[2:]
    if height % cell or width % cell:
        raise ValueError(f"{name} has {height}x{width} pixels; expected multiples of the cell size {cell}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be read: the tensor is on a CPU, and no dispatch mode traces or fakes the call."""
    return tensor.device.type == "cpu" and not torch._C._len_torch_dispatch_stack()


def rows(name: str, index: Tensor, limit: int, distinct: bool = True) -> None:
    """Raises ValueError unless indices are in [0, limit) and, if `distinct`, all differ. Checks CPU tensors only."""
    if not readable(index) or index.numel() == 0:
        return
    least, most = (int(x) for x in index.aminmax())
    if least < 0 or most >= limit:
        raise ValueError(f"{name} has {least if least < 0 else most}; expected indices from 0 to below {limit}")
    if distinct and index.numel() > 1:
        ordered = index.sort().values
        twice = ordered[1:][ordered.diff() == 0]
        if twice.numel():
            raise ValueError(f"{name} has {int(twice[0])} twice; expected distinct indices")


def image_rows(name: str, index: Tensor, offsets: Tensor, cells: int) -> None:
    """Raises ValueError unless `index` and `offsets` are `Rows` of images of `cells` cells. Checks CPU tensors only."""
    if not readable(index):
        return
    starts, values = offsets.tolist(), index.tolist()
    if starts[0] != 0 or starts[-1] != len(values) or any(a > b for a, b in pairwise(starts)):
        raise ValueError(f"{name}.offsets is {starts}; expected it to rise from 0 to the number of rows, {len(values)}")
    for image, (begin, end) in enumerate(pairwise(starts)):
        least, most = image * cells, (image + 1) * cells
        before = least - 1
        for row in values[begin:end]:
            if not before < row < most:
                raise ValueError(
                    f"{name}.index has {row} in image {image}; expected ascending indices from {least} to below {most}"
                )
            before = row

"""Checks of arguments that several ops share: one sentence that names the argument, what came and what is expected.

They look at shapes, dtypes and devices, never at values, so that nothing waits for a GPU; `rows` and `image_rows` do,
and look at CPU tensors alone, where nobody records what is done with them: on a GPU the kernels stay inside the tensors
whatever the indices are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def shape(name: str, tensor: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """Raises ValueError unless the tensor has this shape; None stands for any size. `meaning`: "(rows, channels)"."""
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
    """`floating` and `shape`, of an argument that is there."""
    if tensor is not None:
        floating(name, tensor)
        shape(name, tensor, expected, meaning)


def index(name: str, tensor: Tensor) -> None:
    """Raises unless the tensor is a one-dimensional int64 tensor."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected torch.int64")
    if tensor.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one dimension")


def together(tensors: Iterable[tuple[str, Tensor]]) -> torch.device:
    """The device that all tensors are on. Raises ValueError where they are on several, TypeError for a sparse one."""
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
    """Raises TypeError where dtypes differ and autocast does not `cast` both, as PyTorch's own linear does."""
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
    """Whether values may be looked at: they are here, and no mode records or fakes what reads them."""
    return tensor.device.type == "cpu" and not torch._C._len_torch_dispatch_stack()


def rows(name: str, index: Tensor, limit: int, distinct: bool = True) -> None:
    """Raises ValueError unless every index is from 0 to below `limit` and, if asked, none is there twice; on CPUs."""
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
    """Raises ValueError unless `index` and `offsets` are `Rows` of images of so many cells; on CPU tensors alone."""
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

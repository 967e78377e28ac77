"""Checks of arguments that several ops share: one sentence that names the argument, what came and what is expected."""

from __future__ import annotations

from collections.abc import Sequence

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


def index(name: str, tensor: Tensor) -> None:
    """Raises unless the tensor is a one-dimensional int64 tensor."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected torch.int64")
    if tensor.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one dimension")


def same_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raises ValueError unless every tensor is on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, where the other arguments are")


def same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises TypeError where dtypes differ outside of autocast, as PyTorch's own linear does."""
    if tensor.dtype != other.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise TypeError(
            f"{name} has dtype {tensor.dtype} and {other_name} {other.dtype}; expected the same outside of autocast"
        )


def cells(name: str, pixels: Tensor, cell: int) -> None:
    """Raises ValueError unless `pixels` is (B, C, H, W) with H and W multiples of `cell`."""
    if pixels.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(pixels.shape)}; expected (B, C, H, W)")
    height, width = pixels.shape[2:]
    if height % cell or width % cell:
        raise ValueError(f"{name} has {height}x{width} pixels; expected multiples of the cell size {cell}")

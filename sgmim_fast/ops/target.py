"""What kernels are launched for: the GPU that is there, or another whose launches are caught."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """What launches are made for."""

    architecture: str  # as the configurations' table names it, e.g. "sm_90"
    multiprocessors: int


_caught: list[tuple[Callable[..., None], Target]] = []


@contextlib.contextmanager
def caught(listener: Callable[..., None], target: Target) -> Iterator[None]:
    """Within the block launches go to `listener(kernel, grid, args, options)` in place of the device, chosen as for
    `target`, and nothing is computed: to compile, count or model what an op launches."""
    _caught.append((listener, target))
    try:
        yield
    finally:
        _caught.pop()


def target(device: torch.device) -> Target:
    """What the launches on this device are made for."""
    return _caught[-1][1] if _caught else _target(device)


@functools.cache
def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target("any", 4)  # Triton's interpreter
    properties = torch.cuda.get_device_properties(device)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def listener() -> Callable[..., None] | None:
    """Who gets the launches in place of the device, if anybody does."""
    return _caught[-1][0] if _caught else None


def on_gpu(tensor: Tensor) -> bool:
    """Whether what is launched on its device runs on a GPU, or is caught as if it did."""
    return tensor.is_cuda or bool(_caught)

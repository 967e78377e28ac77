"""The GPU for which kernels are launched: the present one, or another one whose launches are intercepted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """The device for which launches are configured."""

    architecture: str  # as in the configurations' table, e.g. "sm_90"
    multiprocessors: int


_caught: list[tuple[Callable[..., None], Target]] = []


@contextlib.contextmanager
def caught(listener: Callable[..., None], target: Target) -> Iterator[None]:
    """Within the block, launches call `listener(kernel, grid, args, options)` instead of running on the device, with
    configurations for `target`. Nothing is computed: for compiling, counting or modelling an op's launches."""
    _caught.append((listener, target))
    try:
        yield
    finally:
        _caught.pop()


def target(device: torch.device) -> Target:
    """Returns the target of launches on this device."""
    return _caught[-1][1] if _caught else _target(device)


@functools.cache
def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target("any", 4)  # Triton's interpreter
    properties = torch.cuda.get_device_properties(device)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def listener() -> Callable[..., None] | None:
    """Returns the listener that intercepts launches, or None."""
    return _caught[-1][0] if _caught else None


def on_gpu(tensor: Tensor) -> bool:
    """Whether launches on the tensor's device run on a GPU, or are intercepted as if they did."""
    return tensor.is_cuda or bool(_caught)

"""Measures the host's part of a step: runs Triton without a device, and samples what the host does."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# class -> files, or file:function, in which the innermost matching frame of a sample lies
CLASSES: list[tuple[str, tuple[str, ...]]] = [
    ("gemms, by the library", ("kernels/gemm.py", "tools/launches.py")),
    ("copies of weights", ("ops/weights.py", "fused/accelerate.py")),
    (
        "checks, choice of a backend",
        ("ops/_check.py", "sgmim_fast/backends.py", "_op.py:_signature", "_op.py:_watched", "_op.py:chosen"),
    ),
    ("launches through Triton", ("kernels/launch.py", "triton/compiler/compiler.py", "triton/runtime/jit.py")),
    ("what is launched with what", ("kernels/",)),
    ("autograd and its functions", ("ops/_op.py", "torch/autograd/")),
    ("compositions", ("sgmim_fast/ops/",)),
    ("blocks and what they bypass", ("sgmim_fast/fused/", "torch/nn/modules/", "timm/")),
]
REST = "the rest"


class _NoDevice:
    """The part of a Triton driver's interface that a launch uses."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled(CompiledKernel):
    """Replaces a compiled kernel for the device and signature in `key`. A launch calls `launched` instead."""

    def __init__(self, kernel: JITFunction, key: tuple[int, Any], launched: Callable[..., None]):
        self.key, self.launched, self.name = key, launched, kernel.fn.__name__
        self.function, self.module, self.src, self.packed_metadata = key, None, None, None

    def _init_handles(self) -> None:
        pass

    @property
    def run(self) -> Callable[..., None]:
        return self.launched


def _nothing(*_: Any) -> None:
    pass


@contextlib.contextmanager
def triton_without_device(launched: Callable[..., None] = _nothing) -> Iterator[None]:
    """Within the block, `kernel[grid](...)` does all of its host work except compilation and the driver's call.

    Use it only in processes that launch nothing otherwise, since the replacements stay in the kernels' caches.

    launched: called with the arguments of the driver's call: grid, stream, `Compiled.key` in place of a function, ...
    """

    def do_compile(self: JITFunction, key: Any, signature: Any, device: int, *_: Any) -> Compiled:
        self.device_caches[device][0][key] = compiled = Compiled(self, (device, key), launched)
        return compiled

    with mock.patch.object(driver, "_active", _NoDevice()), mock.patch.object(JITFunction, "_do_compile", do_compile):
        yield


def _class_of(frame: FrameType | None) -> str:
    while frame is not None:
        code = frame.f_code
        at = f"{code.co_filename}:{code.co_name}"
        for name, places in CLASSES:
            if any(place in at for place in places):
                return name
        frame = frame.f_back
    return REST


def shares(step: Callable[[], Any], seconds: float = 3.0, interval: float = 5e-4) -> dict[str, float]:
    """Estimates the share of each class in the time of `step`, from samples of the main thread's stack. C++ code counts
    for the Python line that calls it."""
    found: Counter[str] = Counter()

    def sample(_: int, frame: FrameType | None) -> None:
        found[_class_of(frame)] += 1

    before = signal.signal(signal.SIGALRM, sample)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            step()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    total = found.total()
    return {name: found[name] / total for name in [*(name for name, _ in CLASSES), REST]}

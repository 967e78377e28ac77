"""Launches select the compiled kernel that Triton would select, with the same arguments. No GPU or compiler needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import triton.language as tl
from tools.host import Compiled, triton_without_device
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sgmim_fast.kernels import launch


def _source(x, rows, groups, count, width, eps, WIDE: tl.constexpr, BLOCK: tl.constexpr = 64):
    pass


class Launches:
    """Records what reaches the driver: grid, compiled kernel and its arguments."""

    def __init__(self) -> None:
        self.kernel, self.found = JITFunction(_source), []

    def compiled(self) -> list[Compiled]:
        return [c for caches in self.kernel.device_caches.values() for c in caches[0].values()]

    def __call__(self, *args: Any) -> None:
        grid, (_, function, *_), (_, _, *rest) = args[:3], args[3:6], args[6:]
        self.found.append((grid, function, rest))


def tensor(dtype: torch.dtype, offset: int, kind: str) -> torch.Tensor:
    found = torch.empty(64, dtype=dtype)[offset:]
    return nn.Parameter(found, requires_grad=False) if kind == "parameter" else found


tensors = st.builds(
    tensor, st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.sampled_from([0, 1, 8]),
    st.sampled_from(["tensor", "parameter"]),
)  # fmt: skip
numbers = st.sampled_from([0, 1, 2, 15, 16, 17, 48, 1 << 31, 1 << 40])
arguments = st.tuples(
    tensors, st.none() | tensors, st.lists(st.none() | tensors | numbers, min_size=1, max_size=3).map(tuple), numbers,
    numbers, st.sampled_from([1e-5, 1.0, 16.0]),
)  # fmt: skip
options = st.fixed_dictionaries(
    {"WIDE": st.booleans()}, optional={"BLOCK": st.sampled_from([32, 64]), "num_warps": st.sampled_from([1, 4])}
)


@given(st.lists(st.tuples(arguments, options, st.lists(st.integers(1, 4), min_size=1, max_size=3)), max_size=6))
def test_a_launch_reaches_the_kernel_that_triton_would_have_launched(calls: list[Any]) -> None:
    by_us, by_triton = Launches(), Launches()
    for args, named, grid in calls * 2:
        with triton_without_device(by_us):
            launch.run(by_us.kernel, tuple(grid), args, named)
        with triton_without_device(by_triton):
            by_triton.kernel[tuple(grid)](*args, **named)
    assert len(by_us.found) == 2 * len(calls)
    for (grid, function, args), (grid_there, function_there, args_there) in zip(
        by_us.found, by_triton.found, strict=True
    ):
        assert grid == grid_there and function == function_there
        assert all(a is b or a == b for a, b in zip(args, args_there, strict=True))
    assert [c.key[1] for c in by_us.compiled()] == [c.key[1] for c in by_triton.compiled()]


def test_what_is_compiled_once_is_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    args = torch.empty(8), None, (1, 2), 3, 16, 1e-5
    with triton_without_device(launches):
        launch.run(launches.kernel, (1,), args, {"WIDE": True})
        monkeypatch.setattr(JITFunction, "run", None)  # this method binds arguments
        launch.run(launches.kernel, (1,), args, {"WIDE": True})
    assert len(launches.found) == 2


def test_every_device_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    args = torch.empty(8), None, (1, 2), 3, 16, 1e-5
    with triton_without_device(launches):
        for device in (0, 1, 0):
            monkeypatch.setattr(driver.active, "get_current_device", lambda device=device: device)
            launch.run(launches.kernel, (1,), args, {"WIDE": True})
    assert len(launches.compiled()) == 2 and launches.found[0][1] == launches.found[2][1] != launches.found[1][1]

"""Steps of the accelerated models can be captured as CUDA graphs: checked by recording every Triton launch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from fake_graph import FakeGraph, values_unread
from tiny import batch, drawn, family
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from sgmim_fast import backends, capture, graph, selective_mask
from sgmim_fast.ops import gemm, target

NAMES = ["swin", "swinv2", "beit", "vit"]


class Calls(TorchDispatchMode):
    """Records everything that is launched: kernel, grid, numbers, and shapes of tensors, but not their values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def launched(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.found.append((kernel.fn.__name__, grid, described(args), described(options)))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "sgmim_fast":
            op, backward, _ = func._opname.partition("_backward")
            with self:
                return backends.choose(op, "backward" if backward else "forward", "cpu", args)(*args)
        if func.namespace != "profiler":
            self.found.append((str(func), described(args), described(kwargs or {})))
        return func(*args, **(kwargs or {}))


def described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride(), x.dtype
    if isinstance(x, dict):
        return {name: described(value) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return [described(value) for value in x]
    return repr(x)  # NaN, with which tests poison buffers, is not equal to itself


@contextlib.contextmanager
def on_a_gpu(calls: Calls) -> Iterator[None]:
    """Selects the Triton backend as on a GPU, for tensors on the CPU and without computing anything."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "can_run", lambda *args, **options: (True, "")))
        stack.enter_context(backends.use("triton"))
        stack.enter_context(values_unread())
        stack.enter_context(gemm.compute_bfloat16_in(torch.bfloat16))
        stack.enter_context(target.caught(calls.launched, target.Target("sm_90", 132)))
        yield


def setting(name: str) -> tuple[Any, Any, tuple[int, int]]:
    """Returns a step of forward, backward, clipping and AdamW of a model with branch, the model, and the image size."""
    model, size = family(name)
    optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(1e-3), fused=True, capturable=True)
    return capture(model, optimizer, autocast=torch.bfloat16, clip=5.0), model, size


@pytest.mark.parametrize("name", NAMES)
def test_a_step_holds_nothing_that_a_capture_forbids(name, monkeypatch):
    """A step reads nothing on the host, has no shapes that depend on values, copies and draws nothing on the host. Both
    of its graphs are recorded."""
    monkeypatch.setattr(sys.modules["sgmim_fast.capture"], "Graph", FakeGraph)
    step, model, size = setting(name)
    masks = [drawn(model, size, seed=i) for i in range(5)]
    with on_a_gpu(Calls()):
        for i, mask in enumerate(masks):
            images, structure = (x.float() for x in batch(model, size, seed=i))
            step(images, structure, mask)
    assert step.reasons == [] and step.captures == 2


def test_masks_drawn_inside_wait_for_nothing():
    with on_a_gpu(Calls()), graph.watch(torch.device("cpu")) as found:
        seed = torch.zeros(2, dtype=torch.int64)
        seed[1] += 1
        selective_mask(4, 6, seed=seed, shown="visible")
    assert found.reasons == []


def test_masks_with_other_ratios_come_from_the_host():
    """Their counts are copied from the host, and a replay would read them again from memory that may be freed."""
    with on_a_gpu(Calls()), graph.watch(torch.device("cpu")) as found:
        selective_mask(2, 6, [0.5, 0.6], seed=torch.zeros(2, dtype=torch.int64))
    assert found.reasons and found.reasons[0].startswith("sends numbers of the host to the device (selective_mask.py")


@pytest.mark.parametrize("name", NAMES)
def test_launches_are_the_same_whatever_the_data(name):
    """Steps with other masks and images launch the same kernels, ours and PyTorch's, with equal grids and numbers."""
    step, model, size = setting(name)
    found = []
    for i in range(3):
        images, structure = (x.float() for x in batch(model, size, seed=i))
        mask = drawn(model, size, seed=i)
        calls = Calls()
        with on_a_gpu(calls), calls:
            step(images, structure, mask)
        found.append(calls.found)
    assert any("kernel" in call[0] for call in found[1])
    assert len(found[1]) == len(found[2])
    for second, third in zip(found[1], found[2], strict=True):  # the first step creates the optimizer's state
        assert second == third

"""A simulated CUDA graph on the CPU. It replays the same operations on the same memory, without the Python code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sgmim_fast.ops import _check


@contextlib.contextmanager
def values_unread() -> Iterator[None]:
    """Disables the checks of index values, which are made for CPU tensors only."""
    with mock.patch.multiple(_check, rows=mock.DEFAULT, image_rows=mock.DEFAULT):
        yield


class FakeGraph:
    """Replaces `sgmim_fast.graph.Graph`."""

    device_type = "cpu"
    fails = ""  # message of the error that recording raises, if any

    def __init__(self, device: torch.device, generators: list[torch.Generator]) -> None:
        self.generators, self.calls = generators, list[tuple[Any, tuple, dict, Any]]()
        self.replays = 0

    @staticmethod
    def pool() -> Any:
        return object()

    def record(self, function: Callable[[], Any], pool: Any) -> Any:
        recorder, random = _Recorder(self.calls), [g.get_state() for g in (torch.default_generator, *self.generators)]
        try:
            with recorder:
                result = function()
                if self.fails:
                    raise RuntimeError(self.fails)
        finally:
            recorder.undo()
            for generator, state in zip((torch.default_generator, *self.generators), random, strict=True):
                generator.set_state(state)
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                new = func(*args, **kwargs)
                for old, result in zip(pytree.tree_leaves(results), pytree.tree_leaves(new), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != result.data_ptr() and old.numel():
                        old.copy_(result)


class _Recorder(TorchDispatchMode):
    """Records operations. `undo` restores the memory outside of the graph: a capture itself executes nothing."""

    def __init__(self, calls: list[tuple[Any, tuple, dict, Any]]) -> None:
        super().__init__()
        self.calls = calls
        self.own: set[int] = set()  # storages allocated in the graph
        self.saved: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or argument.name.startswith("running_"):  # schemas do not declare that statistics are written
                for tensor in pytree.tree_leaves(given.get(argument.name)):
                    self._keep(tensor)
        result = func(*args, **kwargs)
        before = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before:
                self.own.add(x.untyped_storage()._cdata)
        # Record detached tensors: `p.grad = None` or `.data = ` may later change the objects themselves.
        args, kwargs, results = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs, result))
        self.calls.append((func, args, kwargs, results))
        return result

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own and storage._cdata not in self.saved:
                self.saved[storage._cdata] = storage, storage.clone()

    def undo(self) -> None:
        for storage, old in self.saved.values():
            storage.copy_(old)

"""CUDA graphs, and dispatch modes that detect operations of a step that a graph cannot capture."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sgmim_fast import backends

_CALLER = str(Path(__file__).with_name("capture.py"))
_INTERNAL = (str(Path(torch.__file__).parent), __file__)


class Graph:
    """Captures the device work of a function, and replays it."""

    device_type = "cuda"

    def __init__(self, device: torch.device, generators: list[torch.Generator]) -> None:
        self._device, self._generators, self._graph = device, generators, torch.cuda.CUDAGraph()
        for generator in generators:  # the default generator is registered already
            self._graph.register_generator_state(generator)

    @staticmethod
    def pool() -> Any:
        """A memory pool for graphs that are not replayed concurrently."""
        return torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Any], pool: Any) -> Any:
        """Captures `function`, whose work is not executed. Returns its static outputs.

        Raises:
            RuntimeError: the capture failed; the device's state is as before.
        """
        gc.collect()  # a reference cycle of an earlier step could be freed during the capture, on another stream
        with torch.cuda.device(self._device):
            default = torch.cuda.default_generators[torch.cuda.current_device()]
            try:
                # this thread only: the thread that pins a loader's memory continues
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
                ):
                    return function()
            except RuntimeError:
                # The allocator and the generators still expect the end of the capture. Ending the allocation to the
                # pool raises if it had not begun.
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                for generator in (default, *self._generators):
                    generator.graphsafe_set_state(generator.clone_state())
                raise

    def replay(self) -> None:
        self._graph.replay()


@contextlib.contextmanager
def watch(device: torch.device) -> Iterator[Watch]:
    """Context manager that records what a replay would not repeat, while a step runs eagerly inside.

    A replay repeats the work of the device, but not what the host reads, draws or copies. In tests a CPU may be the
    device; copies from the host are then indistinguishable from others and are not recorded.
    """
    found, state = Watch(device), _host_random_state()
    with _HostReads(found), found:
        yield found
    if _host_random_state() != state:
        found.reasons.append("draws from the random numbers of Python or NumPy")


class Watch(TorchDispatchMode):
    """The dispatch mode of `watch`.

    Attributes:
        reasons: what was found, in order, without repetitions.
        generators: generators of the device that were used, except for the default one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.reasons: list[str] = []
        self.generators: list[torch.Generator] = []

    def _note(self, what: str) -> None:
        # if `capture` itself calls PyTorch, e.g. for the optimizer, there is no frame of the user's code
        where = next(f for f in reversed(traceback.extract_stack()) if not f.filename.startswith(_INTERNAL))
        reason = what if where.filename == _CALLER else f"{what} ({Path(where.filename).name}:{where.lineno})"
        if reason not in self.reasons:
            self.reasons.append(reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sgmim_fast":  # one of our ops: watch its implementation
            op, backward, _ = func._opname.partition("_backward")
            part = "backward" if backward else "forward"
            device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
            with self:
                return backends.choose(op, part, device, args)(*args)
        result = func(*args, **kwargs)
        for reason in self._reasons(func, args, kwargs, result):
            self._note(reason)
        return result

    def _reasons(self, func: Any, args: tuple, kwargs: dict, result: Any) -> Iterator[str]:
        name, tags = func._opname, func.tags
        results = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if torch.Tag.data_dependent_output in tags:
            yield f"{name} reads a value on the host"
        elif torch.Tag.dynamic_output_shape in tags and self._depends_on_values(name, args, kwargs):
            yield f"the shape of what {name} gives depends on values"
        elif name in ("_to_copy", "copy_", "_copy_from"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != (args[0] if name == "copy_" else result).device.type:
                yield "copies between host and device"
        elif name == "lift_fresh" and args[0].device.type == self.device.type and (args[0].is_cuda or args[0].ndim):
            yield "sends numbers of the host to the device"
        if kwargs.get("pin_memory") or name in ("_pin_memory", "pin_memory"):
            yield "pins memory"
        if func.namespace in ("c10d", "_c10d_functional"):
            yield f"{name} communicates with other processes"
        if torch.Tag.nondeterministic_seeded in tags and any(x.numel() for x in results):
            if results[0].device.type != self.device.type:
                yield f"{name} draws on the host"
            generator = kwargs.get("generator")
            if generator is not None and generator not in self.generators:
                self.generators.append(generator)

    @staticmethod
    def _depends_on_values(name: str, args: tuple, kwargs: dict) -> bool:
        if name in ("index", "_unsafe_index", "index_put", "index_put_"):  # only masks as indices depend on values
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return not (name == "repeat_interleave" and kwargs.get("output_size") is not None)


class _HostReads(TorchFunctionMode):
    """Detects reads on the host that are not dispatched."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self.watch._note(f"Tensor.{func.__name__} reads values on the host")
        return func(*args, **(kwargs or {}))


def _host_random_state() -> tuple[Any, ...]:
    state: tuple[Any, ...] = (random.getstate(),)
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state += (kind, keys.tobytes(), *rest)
    return state

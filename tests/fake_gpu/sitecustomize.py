"""Simulates a GPU in every Python process that has this folder in PYTHONPATH, to rehearse a benchmark.

Tensors for "cuda" are on the CPU. Triton's launches are recorded and not executed, so their results are wrong, which is
noticed. Captured steps are those of `fake_graph`. timm's encoders at the published sizes become tiny ones, and so do
the shapes. Everything is timed once. With FAKE_GPU_ONLY=WORD, commands without this word end at once, as if they had
passed. Python commands that such a process starts are forks of it, which saves seconds of imports for each.
"""

from __future__ import annotations

import os
import sys

if (only := os.environ.get("FAKE_GPU_ONLY")) and not {only, "--seconds=3000"} & set(sys.orig_argv):
    os._exit(0)

import argparse
import functools
import importlib
import runpy
import signal
import subprocess
import time
import traceback
from types import SimpleNamespace
from typing import Any

import fake_graph
import timm  # noqa: F401 - for the forks
import torch
from tools import measure, shapes
from torch.overrides import TorchFunctionMode

import sgmim_fast
from sgmim_fast import _native, backends
from sgmim_fast.ops import _check, target

NAME, GIB = "Fake H200", 1 << 30
TINY = {
    "swin_base_patch4_window7_224": {
        **{"img_size": 64, "window_size": 2},
        **{"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
    },
    "beit_base_patch16_224": {"img_size": 64, "embed_dim": 64, "depth": 1, "num_heads": 1},
}
TINY["swinv2_base_window12_192"] = TINY["swin_base_patch4_window7_224"]


def on_cpu(value: Any) -> Any:
    """Replaces "cuda" by the CPU."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return torch.device("cpu") if torch.device(value).type == "cuda" else value
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(map(on_cpu, value))
    return value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") == "pin_memory":
            return args[0]
        kwargs = {k: on_cpu(v) for k, v in (kwargs or {}).items() if k != "pin_memory"}
        return func(*on_cpu(args), **kwargs)


class Kind(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, generator)


generator = torch.Generator


class Generator(metaclass=Kind):
    def __new__(cls, device: Any = "cpu") -> Any:
        return generator(on_cpu(device))


class Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Nothing:
    """A stream, a graph, or a context manager that selects one."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    replay = synchronize = __init__


properties = SimpleNamespace(name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=141 * GIB)
for name, value in {
    **dict.fromkeys(("is_available", "is_bf16_supported"), True),
    **dict.fromkeys(("current_device", "memory_allocated", "max_memory_allocated"), 0),
    **{"device_count": 1, "get_device_name": NAME, "get_device_capability": (9, 0), "current_stream": Nothing()},
    **dict.fromkeys(("synchronize", "reset_peak_memory_stats", "_sleep", "empty_cache"), None),
    "get_device_properties": properties,
}.items():
    setattr(torch.cuda, name, lambda *_, value=value, **__: value)
for name in ("Stream", "stream", "graph", "CUDAGraph", "device"):
    setattr(torch.cuda, name, Nothing)
torch.cuda.Event, torch.Generator = Event, Generator

profile = torch.profiler.profile
torch.profiler.profile = lambda activities=None, **options: profile(
    activities=[torch.profiler.ProfilerActivity.CPU], **options
)

usable = {name: (True, "") for name in ("triton", "torch")}
usable |= {"cuda": (False, "nobody has built it"), "cpu": _native.load_cpu()}
backends.available = lambda: usable
backends.triton_interpreted = lambda: True  # accepts CPU tensors
caught = target.caught(lambda *launch: None, target.Target("sm_90", 132))  # kept: its deletion would end the context
caught.__enter__()
backends.ORDER["cpu"] = ("torch",)  # its steps can be captured
importlib.import_module("sgmim_fast.capture").Graph = fake_graph.FakeGraph
_check.rows = _check.image_rows = lambda *_, **__: None

create = sgmim_fast.create_encoder
sgmim_fast.create_encoder = lambda name, **arguments: create(
    name, **(arguments if "embed_dim" in arguments else arguments | TINY.get(name, {}))
)
for name, shape in shapes.SHAPES.items():
    changes = {"image": 64, "stem": 16, "width": 128, "depths": (1, 1, 1, 1)}
    if shape.prefix:
        changes = {"image": 64, "stem": 64, "width": 64, "depths": (1,)}
    shapes.SHAPES[name] = shape.__class__(**{**shape.__dict__, **changes})
measure.interleaved = functools.partial(measure.interleaved, rounds=(1, 1))
add_argument = argparse.ArgumentParser.add_argument
argparse.ArgumentParser.add_argument = lambda self, *names, **options: add_argument(
    self, *names, **options | ({"default": 1} if names == ("--rounds",) else {})
)
OnCpu().__enter__()


def become(words: list[str], environment: dict[str, str]) -> None:
    """What `python WORDS` does, to the end of this process."""
    os.closerange(3, 1024)  # among them the pipe by which the parent waits until this is another program
    code: Any = 1
    try:
        if not only or only in words:
            os.environ.clear()
            os.environ.update(environment)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if words[0] == "-m":
                sys.argv, sys.path[0] = words[1:], os.getcwd()
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv, sys.path[0] = words, os.path.dirname(words[0])
                runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


class Popen(subprocess.Popen):
    def __init__(self, args: Any, **options: Any) -> None:
        if args[0] == sys.executable and (args[1] == "-m" or args[1].endswith(".py")):
            sys.stdout.flush()
            options["preexec_fn"] = functools.partial(become, args[1:], options["env"])
        super().__init__(args, **options)


subprocess.Popen = Popen

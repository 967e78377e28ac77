"""Measures time and memory of functions, and describes the machine; shared by all benchmarks."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgmim_fast import env

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps the profiler's messages out of the output


def output_file(text: str) -> Path:
    """Argument type of an output file. Checks the folder before anything is measured."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}")
    return path


def plot_file(text: str) -> Path:
    """Argument type of a figure. Checks the folder, matplotlib and the suffix before anything is measured."""
    if not can_plot():
        raise argparse.ArgumentTypeError("drawing needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    path, known = output_file(text), Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise argparse.ArgumentTypeError(f"{path}: expected one of .{', .'.join(sorted(known))}")
    return path


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


class Progress:
    """Shows progress: on a terminal one line, which is overwritten; in a file one line for each phase."""

    def __init__(self) -> None:
        self.start, self.terminal = time.perf_counter(), sys.stderr.isatty()

    def __call__(self, text: str, detail: str = "") -> None:
        line = f"{time.perf_counter() - self.start:4.0f} s  {text}"
        if self.terminal:
            print(f"\r\033[K{line} {detail}", end="", file=sys.stderr, flush=True)
        elif not detail:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Clears the line, before a result is printed."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, Any]:
    """Returns a description of the machine and the software."""
    facts: dict[str, Any] = {"platform": platform.platform(), "threads": torch.get_num_threads(), **env.report()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def autocast(device: str, dtype: torch.dtype, function: Callable[..., Tensor], *args: Any) -> Callable[[], Tensor]:
    """Returns a function that calls `function` under autocast, or without autocast if the dtype is float32."""

    def run() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return function(*args)

    return run


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    steps: Mapping[str, Callable[[], Any]],
    device: str,
    *,
    seconds: float = 60.0,
    rounds: tuple[int, int] = (3, 40),
    progress: Callable[[str], None] = lambda detail: None,
    on_round: Callable[[dict[str, list[float]]], None] = lambda times: None,
    host: dict[str, list[float]] | None = None,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Times the steps in turn, so that a slow phase of the machine affects all of them alike. Returns the seconds of
    each call.

    There are as many rounds as fit into `seconds`, within the range `rounds`, after one round that is not recorded. If
    that round alone exceeds `seconds`, it is the only one and is recorded. The steps must therefore have run before.

    on_round: called after each round with the times so far, in case a time limit ends the run. host: filled with the
    seconds until each call returns, which on a GPU is before its work is done. calls: number of successive calls of a
    step of which each time is the mean. On a GPU the host runs ahead of them, as in a training loop.
    """
    evict = torch.empty(32 << 20, device=device) if device == "cuda" else None

    def once(name: str, step: Callable[[], Any]) -> float:
        if evict is not None:
            evict.zero_()  # writes 128 MiB, which evicts the L2 cache
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        if host is not None:
            host.setdefault(name, []).append((time.perf_counter() - start) / calls)
        synchronize(device)
        return (time.perf_counter() - start) / calls

    first = {name: [once(name, step)] for name, step in steps.items()}
    total = calls * sum(times[0] for times in first.values())
    on_round(first)
    if total > seconds:
        return first
    count = int(min(max(seconds / total, rounds[0]), rounds[1]))
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for number in range(count):
        progress(f"round {number + 1} of {count}")
        for name, step in steps.items():
            times[name].append(once(name, step))
        on_round(times)
    return times


def graphed(step: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Captures forward and backward as a CUDA graph, whose time excludes the host's.

    Args:
        step: sets gradients to None, runs forward and backward, and returns the loss.
        leaves: tensors with gradients. Each replay sets their `grad`.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    held = [(leaf, leaf.grad) for leaf in leaves]

    def replay() -> Tensor:
        graph.replay()
        for leaf, grad in held:
            leaf.grad = grad
        return loss

    return replay


def summary(times: Sequence[float]) -> dict[str, float]:
    """Returns median, 10th and 90th percentile in milliseconds."""
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return {
        "median_ms": 1e3 * statistics.median(times),
        "p10_ms": 1e3 * deciles[0],
        "p90_ms": 1e3 * deciles[-1],
    }


def peak_mib(step: Callable[[], Any], parameters: Sequence[nn.Parameter], device: str) -> float:
    """Returns the peak memory, in MiB, that one call of `step` allocates, without the parameters' gradients."""
    for parameter in parameters:
        parameter.grad = None
    if device == "cuda":
        return _peak_cuda(step, parameters)
    with torch.profiler.profile(profile_memory=True, record_shapes=True, with_stack=False) as profile:
        step()
    gradients = {p.grad.data_ptr(): p.grad.nbytes for p in parameters if p.grad is not None}
    allocations = []

    def visit(event: Any) -> None:
        if event.tag == torch._C._profiler._EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        for child in event.children:
            visit(child)

    for root in profile.profiler.kineto_results.experimental_event_tree():
        visit(root)
    allocations.sort(key=lambda entry: entry[0])
    # A gradient is the last allocation at its address.
    last = {pointer: i for i, (_, pointer, size) in enumerate(allocations) if size > 0}
    excluded = {last[pointer] for pointer in gradients if pointer in last}
    live = peak = 0
    for i, (_, _, size) in enumerate(allocations):
        if i not in excluded:
            live += size
            peak = max(peak, live)
    return peak / 2**20


def _peak_cuda(step: Callable[[], Any], parameters: Sequence[nn.Parameter]) -> float:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # gradients exist before and after, so that they cancel
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20

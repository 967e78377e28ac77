"""Splits a step's time on a CPU by class of kernel, and computes how far it is above the bare gemms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

CLASSES = {  # class -> parts of the names of its profiled events; the first class that matches counts
    "gemms": (
        "_cpu::linear",
        "wgrad",
        "dgrad",
        "::mm",
        "addmm",
        "linear_pointwise",
        "mkldnn",
        "convolution",
    ),
    "attention": ("attention", "position_bias", "bmm", "softmax"),
    "GELU": ("gelu",),
    "norms": ("layer_norm", "embed_norm", "embed_statistics", "row_statistics", "coordinates", "centre"),
    "copies": ("copy", "cat", "roll", "constant_pad", "clone", "index", "gather", "scatter"),
}
REST = "rest"


def class_of(event: str) -> str:
    """Returns the class of a profiled event, which is an operator of PyTorch or of ours. Other events, such as the
    Python code of an op, belong to the rest."""
    if not event.startswith(("aten::", "mkldnn::", "sgmim_fast_cpu::")):
        return REST
    return next((name for name, parts in CLASSES.items() if any(part in event for part in parts)), REST)


def class_times(step: Callable[[], Any]) -> dict[str, float]:
    """Returns class -> milliseconds of one profiled step, after one step of warm-up."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = dict.fromkeys([*CLASSES, REST], 0.0)
    for event in profile.key_averages():
        times[class_of(event.key)] += event.self_cpu_time_total / 1e3
    return times


def above_gemms(times: Mapping[str, float], step: float, floor: float) -> dict[str, float]:
    """Returns the time of each class above the floor, relative to the floor's time. The sum is step / floor - 1.

    Args:
        times: class -> milliseconds in a profile, which are scaled to `step`, since profiling takes time.
        step, floor: milliseconds of the step and of its bare gemms, without a profiler.
    """
    scale = step / sum(times.values()) / floor
    return {name: time * scale - (name == "gemms") for name, time in times.items()}


def sentence(column: str, shares: Mapping[str, float]) -> str:
    parts = ", ".join(f"{name} {100 * share:+.1f} %" for name, share in shares.items())
    return f"{column} is {100 * sum(shares.values()):+.1f} % above the bare gemms: {parts}"

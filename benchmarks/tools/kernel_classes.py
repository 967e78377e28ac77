"""Where a step's time goes on a CPU, by class of kernel, and how far each class is above the bare gemms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

CLASSES = {  # of profiled events, by what their names contain; the first that fits
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
    """Of a profiled event: an operator of PyTorch or of ours. What an op does around them, in Python, is the rest."""
    if not event.startswith(("aten::", "mkldnn::", "sgmim_fast_cpu::")):
        return REST
    return next((name for name, parts in CLASSES.items() if any(part in event for part in parts)), REST)


def class_times(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one step by class; it runs once before."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = dict.fromkeys([*CLASSES, REST], 0.0)
    for event in profile.key_averages():
        times[class_of(event.key)] += event.self_cpu_time_total / 1e3
    return times


def above_gemms(times: Mapping[str, float], step: float, floor: float) -> dict[str, float]:
    """Shares of the floor's time, together what the step takes more than it.

    Args:
        times: of the classes, in a profile, which takes longer.
        step, floor: milliseconds of the step and of its bare gemms, without a profiler.
    """
    scale = step / sum(times.values()) / floor
    return {name: time * scale - (name == "gemms") for name, time in times.items()}


def sentence(column: str, shares: Mapping[str, float]) -> str:
    parts = ", ".join(f"{name} {100 * share:+.1f} %" for name, share in shares.items())
    return f"{column} is {100 * sum(shares.values()):+.1f} % above the bare gemms: {parts}"

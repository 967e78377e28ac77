"""The gemm floor: only the gemms that the visible-only branch needs, each through the best library call."""

from __future__ import annotations

import collections
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tools.measure import synchronize
from tools.shapes import Shape
from torch import Tensor

from sgmim_fast.guidance import embedding_patch
from sgmim_fast.ops import gemm


def branch_gemms(shape: Shape, batch: int, channels: int = 1) -> list[tuple[int, int, int, bool]]:
    """Returns (rows, in, out, whether the input needs a gradient) of every linear layer of the branch, with heads."""
    c, visible, masked = shape.width, batch * shape.visible, batch * shape.masked
    patch, mergings = embedding_patch(shape.stride)
    width, tokens = c >> mergings, masked * 4**mergings
    layers = [(tokens, channels * patch * patch, width, False)]
    for _ in range(mergings):
        tokens, width = tokens // 4, width * 2
        layers.append((tokens, 2 * width, width, True))
    context = masked + 1
    layers += [(visible, c, c, True), (context, c, c, True), (context, c, c, True), (visible, c, c, True)]
    layers += [(visible, c, 4 * c, True), (visible, 4 * c, c, True)]
    pixels = shape.stride**2
    return [*layers, (visible, c, channels * pixels, True), (masked, c, 3 * pixels, True)]


def multiply_accumulates(shape: Shape, batch: int) -> int:
    """Returns the multiply-accumulates of the branch's forward."""
    return sum(rows * inner * outer for rows, inner, outer, _ in branch_gemms(shape, batch))


def encoder_gemms(shape: Shape, batch: int) -> list[tuple[int, int, int, bool]]:
    """Returns the same as `branch_gemms` for the linear layers of the encoder, without the attention's small gemms."""
    layers = [(batch * (shape.image // shape.patch) ** 2, 3 * shape.patch**2, shape.stem, False)]
    for stage, depth in enumerate(shape.depths):
        width, side = shape.stem << stage, shape.image // (shape.patch << stage)
        rows = batch * (side**2 + shape.prefix)
        if stage:
            layers.append((rows, 2 * width, width, True))
        block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        layers += [(rows, inner, outer, True) for inner, outer in block] * depth
    return layers


def attention_gemms(shape: Shape, batch: int) -> float:
    """Returns the multiply-accumulates of the attention's own gemms relative to those of the linear layers, forward and
    backward.

    They are two gemms in the forward and four in the backward, without any recomputation. `encoder_gemms` leaves them
    out, although every attention needs them.
    """
    attention = 0
    for stage, depth in enumerate(shape.depths):
        width, side = shape.stem << stage, shape.image // (shape.patch << stage)
        window = min(shape.window or side, side)
        attention += 6 * depth * batch * (side**2 + shape.prefix) * (window**2 + shape.prefix) * width
    layers = branch_gemms(shape, batch) + encoder_gemms(shape, batch)
    return attention / sum((2 + needs) * rows * inner * outer for rows, inner, outer, needs in layers)


def gemm_floor(shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Returns a function that runs every gemm of the branch once, on operands that are already in the best call's
    dtype."""
    return gemms_floor(branch_gemms(shape, batch), dtype, device)


def gemms_floor(layers: list[tuple[int, int, int, bool]], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Returns the same as `gemm_floor` for any layers. Equal layers share their operands."""
    calls = []
    for (rows, inner, outer, needs), count in collections.Counter(layers).items():
        before = len(calls)
        x = torch.randn(rows, inner, device=device)
        weight, bias, dy = (torch.randn(*s, device=device) for s in ((outer, inner), (outer,), (rows, outer)))
        calls.append(_best([(_forward, x, weight, bias), (_plain_forward, x, weight, bias)], dtype, device))
        if needs:
            calls.append(_best([(_input, dy, weight), (_plain_input, dy, weight)], dtype, device))
        calls.append(_best([(_weight, dy, x), (_plain_weight, dy, x)], dtype, device))
        calls += calls[before:] * (count - 1)

    def run() -> None:
        for call in calls:
            call()

    return run


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gemm._onednn(x, weight, bias)


def _plain_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def _input(dy: Tensor, weight: Tensor) -> Tensor:
    return gemm._onednn(dy, weight.t())


def _plain_input(dy: Tensor, weight: Tensor) -> Tensor:
    return dy @ weight


def _weight(dy: Tensor, x: Tensor) -> Tensor:
    return gemm._onednn(dy.t(), x.t())


def _plain_weight(dy: Tensor, x: Tensor) -> Tensor:
    return dy.t() @ x


def _best(candidates: list[tuple[Any, ...]], dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Returns the fastest of the calls in `dtype` and, on a CPU, also in float32."""
    dtypes = {dtype, torch.float32} if device == "cpu" else {dtype}
    timed = []
    for function, *operands in candidates:
        for kind in dtypes:
            if function.__name__[:6] != "_plain" and not (kind == torch.float32 and gemm._use_onednn(operands[0])):
                continue

            call = functools.partial(function, *(t.to(kind) for t in operands))
            timed.append((_seconds(call, device), len(timed), call))
    return min(timed)[2]


def _seconds(call: Callable[[], Tensor], device: str, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)

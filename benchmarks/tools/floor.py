"""The gemm floor: only the gemms that the visible-only branch needs, each through the best library call."""

from __future__ import annotations

import collections
import functools
import statistics
import time
from collections.abc import Callable

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


def gemms_floor(layers: list[tuple[int, int, int, bool]], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Returns a function that runs every gemm of the layers once, on operands that are already in the best call's
    dtype. Equal layers share their operands."""
    calls = []
    for (rows, inner, outer, needs), count in collections.Counter(layers).items():
        before = len(calls)
        x = torch.randn(rows, inner, device=device)
        weight, bias, dy = (torch.randn(*s, device=device) for s in ((outer, inner), (outer,), (rows, outer)))
        calls.append(_best(torch.nn.functional.linear, gemm._onednn, (x, weight, bias), dtype, device))
        if needs:
            calls.append(_best(torch.mm, lambda dy, w: gemm._onednn(dy, w.t()), (dy, weight), dtype, device))
        calls.append(_best(lambda dy, x: dy.t() @ x, lambda dy, x: gemm._onednn(dy.t(), x.t()), (dy, x), dtype, device))
        calls += calls[before:] * (count - 1)

    def run() -> None:
        for call in calls:
            call()

    return run


def _best(
    plain: Callable[..., Tensor], onednn: Callable[..., Tensor], operands: tuple[Tensor, ...], dtype: torch.dtype,
    device: str,
) -> Callable[[], Tensor]:  # fmt: skip
    """Returns the faster of PyTorch's call in `dtype` and, on a CPU, of both calls in float32."""
    calls = []
    for kind in {dtype, torch.float32} if device == "cpu" else {dtype}:
        cast = [t.to(kind) for t in operands]
        calls.append(functools.partial(plain, *cast))
        if kind == torch.float32 and gemm._use_onednn(operands[0]):
            calls.append(functools.partial(onednn, *cast))
    return min(calls, key=lambda call: _seconds(call, device))


def _seconds(call: Callable[[], Tensor], device: str, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)

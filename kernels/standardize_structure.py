"""`standardize_structure` in Triton: order statistics by radix selection, with one program per map and no sorting.

Floats are compared as unsigned integers in the same order. Four passes over the map, one per byte of the integers from
the most significant, find both deciles at once: a histogram of 256 bins says which bin has the element of a rank. Three
more passes compute mean and variance of the values in range, with the right share of ties, and write the result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.launch import launch, on_device
from sgmim_fast.ops.standardize_structure import raise_if_any

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint16)


@triton.jit
def _read(x, at, inside, UINT16: tl.constexpr):
    """Returns values, whether they are finite, and their keys: unsigned integers in the order of the values."""
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if UINT16:
        value *= 1 / 65536
    bits = value.to(tl.uint32, bitcast=True)
    finite = inside & ((bits & 0x7F800000) != 0x7F800000)
    # Not `~bits`: the interpreter of Triton 3.8 would ask NumPy for an unsigned -1.
    key = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return value, finite, key


@triton.jit
def _value(key):
    """Inverse of the key of `_read`."""
    bits = tl.where(key >> 31 == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _digit(counts, rank):
    """Returns which of 256 bins has the element of this rank, and its rank within the bin."""
    bins = tl.arange(0, 256)
    digit = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
    digit = tl.minimum(digit, 255)  # if there is no such element
    return digit, rank - tl.sum(tl.where(bins < digit, counts, 0), 0)


@triton.jit
def _kernel(x, y, nonfinite, n, UINT16: tl.constexpr, BLOCK: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    x += plane * n
    y += plane * n
    low = tl.zeros([], tl.uint32)  # leading bits of both keys found so far
    high = tl.zeros([], tl.uint32)
    low_rank = tl.zeros([], tl.int32)
    high_rank = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int64)
    last = tl.zeros([], tl.int64)
    for level in tl.static_range(4):
        low_counts = tl.zeros([256], tl.int32)
        high_counts = tl.zeros([256], tl.int32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _, finite, key = _read(x, at, at < n, UINT16)
            byte = (key >> (24 - 8 * level) & 0xFF).to(tl.int32)
            if level == 0:
                low_counts += tl.histogram(byte, 256, mask=finite)
            else:
                above = key >> (32 - 8 * level)
                low_counts += tl.histogram(byte, 256, mask=finite & (above == low))
                high_counts += tl.histogram(byte, 256, mask=finite & (above == high))
        if level == 0:
            high_counts = low_counts
            count = tl.sum(low_counts, 0).to(tl.int64)
            tl.store(nonfinite + plane, n - count)
            # int(0.1 n) and int(0.9 n): both doubles are slightly greater than the decimal numbers
            first, last = count // 10, 9 * count // 10
            low_rank, high_rank = first.to(tl.int32), tl.maximum(last - 1, 0).to(tl.int32)
        digit, low_rank = _digit(low_counts, low_rank)
        low = low << 8 | digit.to(tl.uint32)
        digit, high_rank = _digit(high_counts, high_rank)
        high = high << 8 | digit.to(tl.uint32)

    origin, top = _value(low), _value(high)
    spread = (top - origin).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    up_to_low = tl.zeros([BLOCK], tl.int32)
    below_high = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, finite, key = _read(x, at, at < n, UINT16)
        total += tl.where(finite & (key > low) & (key < high), value - origin, 0.0).to(tl.float64)
        up_to_low += (finite & (key <= low)).to(tl.int32)
        below_high += (finite & (key < high)).to(tl.int32)
    kept = last - first
    lows = (tl.sum(up_to_low, 0) - first).to(tl.float64)  # copies of the lowest and the highest value in range
    highs = (last - tl.sum(below_high, 0)).to(tl.float64)
    mean = (tl.sum(total, 0) + highs * spread) / kept.to(tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, finite, key = _read(x, at, at < n, UINT16)
        centred = (value - origin).to(tl.float64) - mean
        squares += tl.where(finite & (key > low) & (key < high), centred * centred, 0.0)
    variance = tl.sum(squares, 0) + lows * mean * mean + highs * (spread - mean) * (spread - mean)
    variance /= (kept - 1).to(tl.float64)
    if low == high:
        mean *= 0
        variance *= 0
    scale = 1 / tl.sqrt(variance + 1e-6)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, finite, key = _read(x, at, at < n, UINT16)
        result = ((value - origin).to(tl.float64) - mean) * scale
        tl.store(y + at, tl.where(finite & (kept > 1), result, 0.0).to(tl.float32), mask=at < n)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    structure = args[0]
    if structure.dtype not in _DTYPES:
        return False, f"dtype {structure.dtype}; the Triton kernel takes {', '.join(str(d)[6:] for d in _DTYPES)}"
    return structure[0, 0].numel() < 2**31, "a map of more than 2^31 values"


@on_device
def forward(structure: Tensor, ignore: bool) -> Tensor:
    """Cost: reads the map seven times (from L2), writes it once; 1 launch."""
    planes = structure.reshape(structure.shape[0] * structure.shape[1], -1).contiguous()
    y = torch.empty(planes.shape, dtype=torch.float32, device=structure.device)
    nonfinite = torch.empty(planes.shape[0], dtype=torch.int64, device=structure.device)
    launch(
        _kernel,
        (planes.shape[0],),
        planes,
        y,
        nonfinite,
        planes.shape[1],
        UINT16=structure.dtype == torch.uint16,
        BLOCK=2048,
        num_warps=8,
    )
    if not ignore:
        raise_if_any(nonfinite, structure.shape[1])
    return y.view(structure.shape)

"""`position_bias` in Triton: an MLP whose hidden features are never written.

A program of the forward computes a block of entries. A program of the backward computes a block of hidden features and
loops over all entries, so that no sum needs a second launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import dot
from sgmim_fast.kernels.launch import cdiv, launch, next_power_of_2, tf32

ENTRIES, HIDDEN = 32, 32  # per tile


@triton.jit
def _coordinates(coordinates, entry, entries):
    """Loads x and y of a block of entries, (entries, 1) each."""
    x = tl.load(coordinates + 2 * entry, mask=entry < entries, other=0).to(tl.float32)
    y = tl.load(coordinates + 2 * entry + 1, mask=entry < entries, other=0).to(tl.float32)
    return x[:, None], y[:, None]


@triton.jit
def _first_layer(fc1_weight, fc1_bias, j, hidden):
    """Loads the weights of x and y and the bias of a block of hidden features, (1, hidden) each."""
    x = tl.load(fc1_weight + 2 * j, mask=j < hidden, other=0).to(tl.float32)
    y = tl.load(fc1_weight + 2 * j + 1, mask=j < hidden, other=0).to(tl.float32)
    bias = tl.load(fc1_bias + j, mask=j < hidden, other=0).to(tl.float32)
    return x[None, :], y[None, :], bias[None, :]


@triton.jit
def _position_bias_forward_kernel(
    coordinates, fc1_weight, fc1_bias, fc2_weight, scale, table, slope, entries, hidden, heads,
    ENTRIES: tl.constexpr, HIDDEN: tl.constexpr, HEADS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    head = tl.arange(0, HEADS)
    x, y = _coordinates(coordinates, entry, entries)
    logits = tl.zeros([ENTRIES, HEADS], tl.float32)
    for first in range(0, hidden, HIDDEN):
        j = first + tl.arange(0, HIDDEN)
        weight_x, weight_y, bias = _first_layer(fc1_weight, fc1_bias, j, hidden)
        pre_activation = x * weight_x + bias + y * weight_y
        features = tl.where(pre_activation <= 0, 0.0, pre_activation)
        at = head[None, :] * hidden + j[:, None]
        inside = (j < hidden)[:, None] & (head < heads)[None, :]
        second = tl.load(fc2_weight + at, mask=inside, other=0).to(tl.float32)
        logits = dot(features, second, logits, TF32)
    share = 1 / (1 + tl.exp(-logits))
    at = entry[:, None] * heads + head[None, :]
    inside = (entry < entries)[:, None] & (head < heads)[None, :]
    tl.store(table + at, scale * share, mask=inside)
    tl.store(slope + at, scale * share * (1 - share), mask=inside)


@triton.jit
def _position_bias_backward_kernel(
    grad, slope, coordinates, fc1_weight, fc1_bias, fc2_weight, dfc1_weight, dfc1_bias, dfc2_weight,
    entries, hidden, heads,
    ENTRIES: tl.constexpr, HIDDEN: tl.constexpr, HEADS: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * HIDDEN + tl.arange(0, HIDDEN)
    head = tl.arange(0, HEADS)
    weight_x, weight_y, bias = _first_layer(fc1_weight, fc1_bias, j, hidden)
    at = head[:, None] * hidden + j[None, :]
    of_weights = (head < heads)[:, None] & (j < hidden)[None, :]
    second = tl.load(fc2_weight + at, mask=of_weights, other=0).to(tl.float32)
    dsecond = tl.zeros([HEADS, HIDDEN], tl.float32)
    sum_x = tl.zeros([HIDDEN], tl.float32)
    sum_y = tl.zeros([HIDDEN], tl.float32)
    total = tl.zeros([HIDDEN], tl.float32)
    for first in range(0, entries, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        x, y = _coordinates(coordinates, entry, entries)
        pre_activation = x * weight_x + bias + y * weight_y
        features = tl.where(pre_activation <= 0, 0.0, pre_activation)
        of_logits = entry[:, None] * heads + head[None, :]
        inside = (entry < entries)[:, None] & (head < heads)[None, :]
        dlogits = tl.load(grad + of_logits, mask=inside, other=0) * tl.load(slope + of_logits, mask=inside, other=0)
        dsecond = dot(tl.trans(dlogits), features, dsecond, TF32)
        d = dot(dlogits, second, tl.zeros([ENTRIES, HIDDEN], tl.float32), TF32)
        d = tl.where(pre_activation <= 0, 0.0, d)
        sum_x += tl.sum(d * x, 0)
        sum_y += tl.sum(d * y, 0)
        total += tl.sum(d, 0)
    tl.store(dfc2_weight + at, dsecond, mask=of_weights)
    tl.store(dfc1_weight + 2 * j, sum_x, mask=j < hidden)
    tl.store(dfc1_weight + 2 * j + 1, sum_y, mask=j < hidden)
    tl.store(dfc1_bias + j, total, mask=j < hidden)


def _options(heads: int) -> dict[str, Any]:
    return {"ENTRIES": ENTRIES, "HIDDEN": HIDDEN, "HEADS": max(16, next_power_of_2(heads)), "TF32": tf32()}


def position_bias(a: Any) -> tuple[Tensor, Tensor]:
    """Cost: a few hundred kilobytes; 1 launch."""
    tensors = [t.contiguous() for t in a[:4]]
    entries, (heads, hidden) = tensors[0].numel() // 2, a.fc2_weight.shape
    table, slope = (torch.empty(entries, heads, dtype=a.dtype, device=a.fc2_weight.device) for _ in range(2))
    grid = (cdiv(entries, ENTRIES) if heads else 0,)
    launch(
        _position_bias_forward_kernel, grid, *tensors, a.scale, table, slope, entries, hidden, heads, **_options(heads)
    )
    return table, slope


def position_bias_backward(grad: Tensor, slope: Tensor, a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Cost: as the forward; 1 launch."""
    tensors = [t.contiguous() for t in a[:4]]
    heads, hidden = a.fc2_weight.shape
    found = tuple(torch.empty(t.shape, dtype=a.dtype, device=t.device) for t in a[1:4])
    sizes = tensors[0].numel() // 2, hidden, heads
    launch(
        _position_bias_backward_kernel,
        (cdiv(hidden, HIDDEN),),
        grad,
        slope,
        *tensors,
        *found,
        *sizes,
        **_options(heads),
    )
    return found

"""`window_attention` on the CPU: csrc/cpu/window_attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops._op import absent
from sgmim_fast.ops.cpu.linear_l1 import NATIVE
from sgmim_fast.ops.window_attention import factor, logit_scale_gradient


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    dtype = args[0 if part == "forward" else 1].dtype
    return dtype in NATIVE, f"dtype {dtype}; the C++ kernels take float32 and bfloat16"


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    logit_scale: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: list[int],
    shift: list[int],
) -> Tensor:
    batch, height, width, channels = qkv.shape
    out = torch.empty(batch, height, width, channels // 3, dtype=qkv.dtype)
    tensors = _tensors(qkv, bias, index, logit_scale, pad)
    torch.ops.sgmim_fast_cpu.window_attention(*tensors, heads, *window, *shift, out)
    return out


def backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    logit_scale: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: list[int],
    shift: list[int],
    needs: list[bool],
) -> list[Tensor]:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    sums = [
        torch.empty(t.shape) if need else None
        for t, need in zip((bias, pad, logit_scale), (needs[1], needs[3], needs[2]), strict=True)
    ]
    tensors = _tensors(qkv, bias, index, logit_scale, pad)
    torch.ops.sgmim_fast_cpu.window_attention_backward(
        grad.to(qkv.dtype).contiguous(), *tensors, heads, *window, *shift, dqkv, *sums
    )
    dbias, dpad, d_log = sums
    return [
        dqkv if needs[0] else absent(qkv),
        absent(qkv) if dbias is None else dbias.to(bias.dtype),
        absent(qkv) if d_log is None else logit_scale_gradient(d_log, logit_scale),
        absent(qkv) if dpad is None else dpad.to(pad.dtype),
    ]


def _tensors(
    qkv: Tensor, bias: Tensor | None, index: Tensor | None, logit_scale: Tensor | None, pad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """As the kernels read them."""
    return (
        qkv.contiguous(),
        None if bias is None else bias.float().contiguous(),
        None if index is None else index.contiguous(),
        None if logit_scale is None else factor(logit_scale, torch.float32).contiguous(),
        None if pad is None else pad.to(qkv.dtype).contiguous(),
    )

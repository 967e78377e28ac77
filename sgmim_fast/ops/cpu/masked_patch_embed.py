"""`masked_patch_embed` on the CPU: library products, and csrc/cpu/masked_patch_embed.cpp around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops import products
from sgmim_fast.ops.cpu.linear_l1 import NATIVE
from sgmim_fast.ops.masked_patch_embed import Stem, gradients, output_shape, patches


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    x, dtype = args[0] if part == "forward" else args[1], args[-1]
    wanted = dtype or x.dtype
    return wanted in NATIVE, f"dtype {wanted}; the C++ kernels take float32 and bfloat16"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_token: Tensor,
    visible: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]]:
    visible = visible.contiguous()
    embedded = products.linear(patches(x, weight, visible, dtype), weight.flatten(1), bias)
    out = torch.empty(output_shape(x, weight), dtype=dtype or x.dtype)
    statistics = None if norm_weight is None else torch.empty(2, visible.shape[0])
    torch.ops.sgmim_fast_cpu.place_tokens(
        embedded,
        visible,
        _vector(mask_token),
        _vector(norm_weight),
        _vector(norm_bias),
        eps,
        out.view(-1, out.shape[2]),
        statistics,
    )
    return out, [] if statistics is None else [embedded, statistics]


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_token: Tensor,
    visible: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    saved: list[Tensor],
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    visible = visible.contiguous()
    embedded, statistics = saved or (None, None)
    width = weight.shape[0]
    storage = products.compute_dtype(dtype or x.dtype, x.device) if embedded is None else embedded.dtype
    dembedded = torch.empty(visible.shape[0], width, dtype=storage)
    sums = torch.empty(4, width)
    torch.ops.sgmim_fast_cpu.place_tokens_backward(
        grad.reshape(-1, width).contiguous(), embedded, visible, _vector(norm_weight), statistics, dembedded, sums
    )
    stem = Stem(x, weight, bias, mask_token, visible, norm_weight, norm_bias)
    return gradients(stem, needs, dtype, dembedded, sums)


def _vector(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()

"""`masked_patch_embed` on an NVIDIA GPU: the library's product between csrc/cuda/gather_patches.cu and
csrc/cuda/masked_patch_embed.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops import products
from sgmim_fast.ops.masked_patch_embed import Stem, gradients, output_shape, patches

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    x, weight = args[:2] if part == "forward" else args[1:3]
    dtype, width = args[-1] or x.dtype, weight.shape[0]
    if dtype not in _DTYPES:
        return False, f"dtype {dtype}; the CUDA kernels take {', '.join(str(d)[6:] for d in _DTYPES)}"
    fits = torch.ops.sgmim_fast_cuda.place_tokens_parts(1, width) > 0
    return fits, f"rows of {width} numbers; the CUDA kernel sums at most 6144 in shared memory"


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
    """Cost: reads the visible patches, writes them packed and embedded, and every token once; 3 launches, and one for
    each argument that is not in its dtype."""
    visible = visible.contiguous()
    embedded = products.linear(patches(x, weight, visible, dtype), weight.flatten(1), bias)
    out = torch.empty(output_shape(x, weight), dtype=dtype or x.dtype, device=x.device)
    statistics = None
    if norm_weight is not None:
        statistics = torch.empty(2, visible.shape[0], dtype=torch.float32, device=x.device)
    torch.ops.sgmim_fast_cuda.place_tokens(
        embedded,
        visible,
        _inverse(out),
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
    """Cost: reads the gradient of the tokens and the visible patches once; 1 launch, 2 for the weight, 2 for the
    images, and one for each vector."""
    visible = visible.contiguous()
    embedded, statistics = saved or (None, None)
    rows = grad.reshape(-1, weight.shape[0]).contiguous()
    dembedded = torch.empty(visible.shape[0], rows.shape[1], dtype=rows.dtype, device=x.device)
    parts = torch.ops.sgmim_fast_cuda.place_tokens_parts(*rows.shape)
    partials = torch.empty(parts, 4, rows.shape[1], dtype=torch.float32, device=x.device)
    sums = torch.empty(4, rows.shape[1], dtype=torch.float32, device=x.device)
    torch.ops.sgmim_fast_cuda.place_tokens_backward(
        rows, embedded, visible, _inverse(grad), _vector(norm_weight), statistics, dembedded, partials, sums
    )
    stem = Stem(x, weight, bias, mask_token, visible, norm_weight, norm_bias)
    return gradients(stem, needs, dtype, dembedded, sums)


def _inverse(tokens: Tensor) -> Tensor:
    """Memory for the inverse of the list of visible patches."""
    return torch.empty(tokens.shape[0] * tokens.shape[1], dtype=torch.int64, device=tokens.device)


def _vector(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()

"""The primitives of `window_attention` and `norm_attention` on NVIDIA GPUs, in bfloat16 and float16: the attention of
csrc/cuda/window_attention.cu, and Triton's for everything else.

On an H200 it takes 0.6 of the time of Triton's kernels in windows of 36 tokens, and less in larger ones
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops.primitives import Request, Windows

MOST_TOKENS = {32: 144, 64: 64}  # channels of a head -> tokens of a window
CHECKS_INDICES = True  # the kernel clamps them


def __getattr__(name: str) -> Any:
    from sgmim_fast.kernels import primitives as triton

    return getattr(triton, name)


def takes(request: Request) -> tuple[bool, str]:
    usable, reason = backends.available()["triton"]
    if usable:
        usable, reason = __getattr__("takes")(request)
    if not usable:
        return False, f"its sums, gemms and norms run in Triton: {reason}"
    dtype, (tokens, width) = request.dtypes[-1], request.window
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"dtype {dtype}; the CUDA kernel takes bfloat16 and float16"
    if width not in MOST_TOKENS:
        return False, f"heads of {width} channels; the CUDA kernel takes {' and '.join(map(str, MOST_TOKENS))}"
    if tokens > MOST_TOKENS[width]:
        return False, f"windows of {tokens} tokens; the CUDA kernel holds {MOST_TOKENS[width]} with {width} channels"
    needed = _constant("memory", tokens, width, True)
    most = torch.cuda.get_device_properties().shared_memory_per_block_optin
    return needed <= most, f"windows of {tokens} tokens need {needed} bytes of shared memory; this GPU has {most}"


@functools.cache
def _constant(name: str, *sizes: int) -> int:
    """Returns a constant of the library's kernels for these sizes, without a call of the library each time."""
    return getattr(torch.ops.sgmim_fast_cuda, f"window_attention_{name}")(*sizes)


def window_attention(qkv: Tensor, w: Windows) -> Tensor:
    """Cost: reads qkv and writes the result once; 2 launches."""
    out = torch.empty(*qkv.shape[:3], qkv.shape[3] // 3, dtype=qkv.dtype, device=qkv.device)
    arguments, _, _ = _arguments(qkv, w, backward=False)
    torch.ops.sgmim_fast_cuda.window_attention(*arguments, out)
    return out


def window_attention_backward(
    grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str], out: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cost: reads qkv and grad and writes dqkv once; 2 launches, and 3 more for the gradient of a bias table."""
    from sgmim_fast.kernels.window_attention import other_sums

    if out is not None:
        out.copy_(window_attention(qkv, w))
    arguments, groups, padded = _arguments(qkv, w, backward=True)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    sizes = {"bias": w.heads * (w.window[0] * w.window[1]) ** 2, "logit_scale": w.heads}
    sums = {
        name: torch.empty(groups, size, dtype=torch.float32, device=qkv.device)
        for name, size in sizes.items()
        if name in wanted
    }
    outside = None
    if padded and ("pad" in wanted or "qkv_bias" in wanted):
        outside = torch.empty(groups, qkv.shape[3], dtype=torch.float32, device=qkv.device)
    parts = sums.get("bias"), sums.get("logit_scale"), outside
    torch.ops.sgmim_fast_cuda.window_attention_backward(_aligned(grad.to(qkv.dtype)), *arguments, dqkv, *parts)
    return dqkv, sums | other_sums(dqkv, w, sums, outside, wanted)


def _arguments(qkv: Tensor, w: Windows, backward: bool) -> tuple[list[Any], int, bool]:
    """Returns the leading arguments of both operators, the groups of windows, and whether windows stick out."""
    height, width, (h, across) = qkv.shape[1], qkv.shape[2], w.window
    down, right = -(-height // h), -(-width // across)
    padded = height % h > 0 or width % across > 0
    tokens, depth, windows = h * across, qkv.shape[3] // 3 // w.heads, qkv.shape[0] * down * right
    groups = _groups(qkv.device, tokens, depth, w.heads, windows, backward)
    size = _constant("spread", tokens, w.heads)
    vectors = [None if t is None else t.float().contiguous() for t in (w.bias, w.logit_scale)]
    index = None if w.index is None else w.index.contiguous()
    pad = _aligned(w.pad.to(qkv.dtype)) if padded and w.pad is not None else None
    spread = torch.empty(size, dtype=torch.float32, device=qkv.device)
    return (
        [_aligned(qkv), vectors[0], index, vectors[1], pad, w.heads, *w.window, *w.shift, groups, spread],
        groups,
        padded,
    )


def _groups(device: torch.device, tokens: int, depth: int, heads: int, windows: int, backward: bool) -> int:
    """Returns the number of groups whose blocks, one per head, are resident on the GPU at once. No group is empty."""
    multiprocessors, memory = 4, 1 << 18
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        multiprocessors, memory = properties.multi_processor_count, properties.shared_memory_per_multiprocessor
    blocks = _constant("blocks", tokens, depth, backward, memory)
    each = -(-windows // max(1, multiprocessors * blocks // heads))
    return -(-windows // max(1, each))


def _aligned(x: Tensor) -> Tensor:
    """Returns x contiguous and at an address divisible by 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()

"""`relational_guidance` on an NVIDIA GPU: the attention of csrc/cuda/relational_guidance.cu between Triton's kernels.

Products, norms and sums are those of `sgmim_fast.kernels`. Whether this attention is faster than Triton's has not been
measured, so it has to be asked for: `backends.use("cuda")`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops.relational_guidance import storage_dtype


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    if backends.forced() != "cuda":
        return False, "its attention has not been measured against Triton's; backends.use('cuda') asks for it"
    usable, reason = backends.available()["triton"]
    if not usable:
        return False, f"its products run in Triton: {reason}"
    from sgmim_fast.kernels import relational_guidance as triton

    usable, reason = triton.can_run(part, args)
    if not usable:
        return False, reason
    features, heads = (args[0], args[5]) if part == "forward" else (args[1], args[7])
    size, depth = storage_dtype(features, args[-1]).itemsize, features.shape[1] // heads
    needed = torch.ops.sgmim_fast_cuda.attention_memory(size, depth, part == "backward")
    most = torch.cuda.get_device_properties(features.device).shared_memory_per_block_optin
    return needed <= most, f"heads of width {depth} need {needed} bytes of shared memory; this GPU has {most} per block"


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible_offsets: Tensor, shown_offsets: Tensor, cells: int, heads: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """As `kernels.relational_guidance.attention`. Cost: reads q, and k and v once per 32 queries; 1 launch."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[0], heads, dtype=torch.float32, device=q.device)
    torch.ops.sgmim_fast_cuda.attention(q, k, v, visible_offsets, shown_offsets, out, lse, cells, heads, keep)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    visible_offsets: Tensor,
    shown_offsets: Tensor,
    cells: int,
    heads: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.relational_guidance.attention_backward`. Cost: reads q, dout and out once per 32 keys, k and v once
    per 32 queries; 1 launch."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    hidden_sums = torch.empty(2, visible_offsets.shape[0] - 1, q.shape[1], dtype=torch.float32, device=q.device)
    offsets = visible_offsets, shown_offsets
    gradients = dq, dk, dv, hidden_sums
    torch.ops.sgmim_fast_cuda.attention_backward(dout, q, k, v, out, lse, *offsets, *gradients, cells, heads, keep)
    return dq, dk, dv


def forward(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """Cost: as `kernels.relational_guidance.forward`."""
    from sgmim_fast.kernels import relational_guidance as triton

    return triton.forward(*args, attention)


def backward(*args: Any) -> list[Tensor]:
    """Cost: as `kernels.relational_guidance.backward`."""
    from sgmim_fast.kernels import relational_guidance as triton

    return triton.backward(*args, attention_backward)

"""The primitives of `relational_guidance` on NVIDIA GPUs: the attention of csrc/cuda/relational_guidance.cu, and
Triton's for everything else.

On an H200 this attention was no faster than Triton's. It is therefore chosen only by `backends.use("cuda")`, or by
`sgmim_fast.tune` where it is the fastest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops.primitives import Packed, storage_dtype


def __getattr__(name: str) -> Any:
    from sgmim_fast.kernels import primitives as triton

    return getattr(triton, name)


def can_run(part: str, a: Any) -> tuple[bool, str]:
    usable, reason = backends.can_run("relational_guidance", "triton", *a)
    if not usable:
        return False, f"its gemms and norms run in Triton: {reason}"
    size, depth = storage_dtype(a.features, a.dtype).itemsize, a.features.shape[1] // a.heads
    needed = torch.ops.sgmim_fast_cuda.attention_memory(size, depth, part == "backward")
    most = torch.cuda.get_device_properties(a.features.device).shared_memory_per_block_optin
    return needed <= most, f"heads of width {depth} need {needed} bytes of shared memory; this GPU has {most} per block"


def guidance_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Cost: reads q, and k and v once per 32 queries; 1 launch."""
    out = torch.empty_like(q)
    lse = torch.empty(2, q.shape[0], packed.heads, dtype=torch.float32, device=q.device)
    offsets, sizes = (packed.visible_offsets, packed.shown_offsets), packed[4:]
    torch.ops.sgmim_fast_cuda.attention(q, k, v, *offsets, out, lse, *sizes)
    return out, lse


def guidance_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: Packed
) -> tuple[Tensor, Tensor, Tensor]:
    """Cost: reads q, dout and out once per 32 keys, k and v once per 32 queries; 1 launch."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    offsets, sizes = (packed.visible_offsets, packed.shown_offsets), packed[4:]
    hidden_sums = torch.empty(2, offsets[0].shape[0] - 1, q.shape[1], dtype=torch.float32, device=q.device)
    found = dq, dk, dv, hidden_sums
    torch.ops.sgmim_fast_cuda.attention_backward(dout, q, k, v, out, lse, *offsets, *found, *sizes)
    return dq, dk, dv

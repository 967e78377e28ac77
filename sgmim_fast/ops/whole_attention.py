"""Attention of all tokens without bias, shift or padding (ViT), by PyTorch's scaled dot product attention.

Ops run below autograd, so forward and backward are called as separate operators. The backward recomputes the forward, a
fifth of its time, instead of saving its results. On a GPU, flash attention's backward is not deterministic with more
than two blocks of keys (256 tokens), unless PyTorch is set to be deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgmim_fast.ops.primitives import Windows

MULTIPLE, MOST = 8, 256  # channels of a head on a GPU: divisor and maximum


def takes(qkv: Tensor, w: Windows) -> bool:
    """Whether the attention is such and PyTorch's flash attention supports it."""
    bare = w.bias is None and w.logit_scale is None and not any(w.shift) and (*w.window,) == (*qkv.shape[1:3],)
    if not bare or qkv.numel() == 0:
        return False
    if not qkv.is_cuda:
        return qkv.device.type == "cpu"
    width = qkv.shape[3] // 3 // w.heads
    return qkv.dtype in (torch.float16, torch.bfloat16) and width % MULTIPLE == 0 and width <= MOST


def _split(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, H, W, parts * heads * d) -> `parts` tensors (B, heads, N, d)."""
    return x.flatten(1, 2).unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    aten = torch.ops.aten
    if q.is_cuda:
        return aten._scaled_dot_product_flash_attention(q, k, v)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def whole_attention(qkv: Tensor, w: Windows) -> Tensor:
    """`ops.window_attention` for arguments that `takes` accepts."""
    out = _forward(*_split(qkv, 3, w.heads))[0]
    return out.transpose(1, 2).reshape(*qkv.shape[:3], -1)


def whole_attention_backward(grad: Tensor, qkv: Tensor, w: Windows) -> Tensor:
    """Returns the gradient of qkv. Cost: 3 launches, and flash attention's own."""
    aten, (q, k, v) = torch.ops.aten, _split(qkv, 3, w.heads)
    (dout,) = _split(grad.to(qkv.dtype), 1, w.heads)
    out, lse, *rest = _forward(q, k, v)
    if q.is_cuda:
        *lengths, seed, offset, _ = rest
        found = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, *lengths, 0.0, False, seed, offset
        )
    else:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, False)
    return torch.stack([d.transpose(1, 2) for d in found], 2).reshape(qkv.shape)

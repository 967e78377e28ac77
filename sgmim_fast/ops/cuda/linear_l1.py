"""`linear_l1` on an NVIDIA GPU: csrc/cuda/linear_l1.cu. The signs that it keeps are packed to bits.

Whether its products are faster than Triton's has not been measured, so it has to be asked for: `backends.use("cuda")`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops import products
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.linear_l1 import is_packed, packed_shape, target_gradient, unpack_signs

_TILE = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    x, dtype = args[0] if part == "forward" else args[1], args[-1]
    if part == "forward" and backends.forced() != "cuda":
        return False, "its product has not been measured against Triton's; backends.use('cuda') asks for it"
    if part == "backward" and not is_packed(args[5][0]):
        return False, "another backend ran the forward, and kept a byte for each sign"
    return (dtype or x.dtype) in _DTYPES, (
        f"dtype {dtype or x.dtype}; the CUDA kernel takes {', '.join(str(d)[6:] for d in _DTYPES)}"
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    valid: Tensor | None,
    rows: Tensor,
    cell: int,
    packed: bool,
    scale: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]]:
    """Cost: reads x and W for each tile of 64 x 64, the wanted pixels once, writes a quarter of a byte per pixel; 2
    launches, and one for each of x, W, bias and target that is not in its dtype."""
    compute = products.compute_dtype(dtype or x.dtype, x.device)
    copies = [copy.contiguous() for copy in products.copies([weight], compute)]
    count, outs = rows.shape[0], weight.shape[0]
    signs = torch.empty(packed_shape(count, outs), dtype=torch.int32, device=x.device)
    partials = torch.empty(-(-count // _TILE) * -(-outs // _TILE), dtype=torch.float64, device=x.device)
    total = torch.empty((), dtype=torch.float32, device=x.device)
    torch.ops.sgmim_fast_cuda.linear_l1(
        x.to(compute).contiguous(),
        (copies[0] if copies else weight).contiguous(),
        bias.float().contiguous(),
        target.float(),
        valid,
        rows.contiguous(),
        cell,
        packed,
        scale,
        signs,
        partials,
        total,
    )
    return total, [signs, *copies]


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    saved: list[Tensor],
    rows: Tensor,
    cell: int,
    packed: bool,
    scale: float,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Cost: reads W for each 64 rows, x for each 64 outputs, the signs' bits for each 64 columns of either; 1 launch,
    one more where x is not in its dtype, and a fill where x is not packed. The target's gradient takes a few more."""
    signs, *copies = saved
    compute, rows = products.compute_dtype(dtype or x.dtype, x.device), rows.contiguous()
    grads = [absent(x) for _ in needs]
    if any(needs[:3]):
        allocate = torch.empty if packed else torch.zeros
        wanted = (x if needs[0] else None, weight if any(needs[1:3]) else None)
        dx, dweight = (
            absent(x) if t is None else create(t.shape, dtype=_stored(t, compute), device=x.device)
            for t, create in zip(wanted, (allocate, torch.empty), strict=True)
        )
        dbias = torch.empty(bias.shape if dweight.numel() else 0, dtype=torch.float32, device=x.device)
        operands = x.to(compute).contiguous(), (copies[0] if copies else weight).contiguous()
        results = dx, dweight, dbias
        torch.ops.sgmim_fast_cuda.linear_l1_backward(grad, *operands, signs, rows, packed, scale, *results)
        for i, (gradient, t) in enumerate(zip(results, (x, weight, bias), strict=True)):
            if needs[i]:
                grads[i] = gradient.to(t.dtype)
    if needs[3]:
        grads[3] = target_gradient(grad * scale, unpack_signs(signs, weight.shape[0]), target, rows, cell)
    return grads


def _stored(t: Tensor, compute: torch.dtype) -> torch.dtype:
    """What the kernel writes the gradient of `t` in: its own dtype where it can."""
    return t.dtype if t.dtype in (compute, torch.float32) else torch.float32

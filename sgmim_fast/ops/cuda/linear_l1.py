"""`linear_l1` on an NVIDIA GPU: the forward in csrc/cuda/linear_l1.cu, the backward's products in Triton.

Whether this forward is faster than Triton's has not been measured, so it has to be asked for: `backends.use("cuda")`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops import products

_TILE = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    if backends.forced() != "cuda":
        return False, "its product has not been measured against Triton's; backends.use('cuda') asks for it"
    x, dtype = args[0] if part == "forward" else args[1], args[-1]
    if (dtype or x.dtype) not in _DTYPES:
        return False, f"dtype {dtype or x.dtype}; the CUDA kernel takes {', '.join(str(d)[6:] for d in _DTYPES)}"
    usable, reason = backends.available()["triton"]
    return usable, f"the backward's products run in Triton: {reason}"


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
    """Cost: reads x and W for each tile of 64 x 64, the wanted pixels once, writes a byte per pixel; 2 launches, and
    one for each of x, W, bias and target that is not in its dtype."""
    compute = products.compute_dtype(dtype or x.dtype, x.device)
    copies = [copy.contiguous() for copy in products.copies([weight], compute)]
    count, outs = rows.shape[0], weight.shape[0]
    signs = torch.empty(count, outs, dtype=torch.int8, device=x.device)
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


def backward(*args: Any) -> list[Tensor]:
    """Cost: as `kernels.linear_l1.backward`."""
    from sgmim_fast.kernels import linear_l1 as triton

    return triton.backward(*args)

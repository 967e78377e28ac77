"""The backward of layer scale, which multiplies the result of a linear layer by one number per output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels.arithmetic import cast
from sgmim_fast.kernels.launch import launch, next_power_of_2


@triton.jit
def _layer_scale_backward_kernel(scale, weight, dweight, bias, dbias, dscale, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    factor = tl.load(scale + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        at, inside = row.to(tl.int64) * width + column, column < width
        gradient = tl.load(dweight + at, mask=inside, other=0.0).to(tl.float32)
        total += gradient * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dweight + at, cast(gradient * factor, dweight.dtype.element_ty), mask=inside)
    result = tl.sum(total, 0)
    if dbias is not None:
        gradient = tl.load(dbias + row).to(tl.float32)
        result += gradient * tl.load(bias + row).to(tl.float32)
        tl.store(dbias + row, cast(gradient * factor, dbias.dtype.element_ty))
    tl.store(dscale + row, result)


def layer_scale_backward(
    scale: Tensor, weight: Tensor, dweight: Tensor, bias: Tensor | None, dbias: Tensor | None
) -> Tensor:
    """Cost: reads the weight and its gradient, and writes the gradient; 1 launch."""
    rows, width = weight.shape
    dscale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    launch(
        _layer_scale_backward_kernel,
        (rows,),
        scale.contiguous(),
        weight.contiguous(),
        dweight,
        None if dbias is None else bias.contiguous(),
        dbias,
        dscale,
        width,
        BLOCK=min(next_power_of_2(width), 1024),
    )
    return dscale

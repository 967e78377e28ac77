"""Shared by the benchmarks of single ops: calls an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops import cases

# op -> arguments that need no gradient in a training step
CONSTANT = {"masked_patch_embed": ("x",), "structure_embed": ("structure",), "linear_l1": ("target",)}
CONSTANT |= {"standardize_structure": ("structure",), "token_salience": ("x",), "position_bias": ("coordinates",)}


def forward_backward(
    op: str, arguments: Any, backward: bool = True
) -> Callable[[Callable[[Any], Any], torch.dtype], list[Tensor]]:
    """Returns `run(function, dtype)`, which calls a function of the op's float32 arguments under autocast, and returns
    its results and, with `backward`, the gradients."""
    leaves = cases.leaves(op, arguments, *CONSTANT.get(op, ())) if backward else []
    device = arguments[0].device.type
    with backends.use("torch"), torch.no_grad():
        cotangent = torch.randn_like(cases.call(op, arguments)) if leaves else None

    def run(function: Callable[[Any], Any], dtype: torch.dtype) -> list[Tensor]:
        # Under autocast, the projection before window attention returns qkv in `dtype`.
        a = arguments._replace(qkv=arguments.qkv.to(dtype)) if op == "window_attention" else arguments
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            result = function(a)
        if cotangent is None:
            return list(result) if isinstance(result, tuple) else [result]
        return [result.detach(), *torch.autograd.grad(result, leaves, cotangent.to(result.dtype))]

    return run

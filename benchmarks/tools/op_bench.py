"""Shared by the benchmarks of single ops: calls an op, compares its results with plain PyTorch's, and times it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tools.agree import assert_agree
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops import cases

BATCH = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("torch", "cpu")
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


def compare(
    benchmark: Any, op: str, name: str, group: str, dtype: str, arguments: Any, backward: bool = True, **plain: Callable
) -> None:
    """Times one column: a function of `plain`, or a backend, after its results and gradients were compared with those
    of the first function of `plain`.

    Args:
        name: name of the column: one of `plain`, or a backend.
        group: title of the group of columns.
        dtype: dtype of the column.
        arguments: arguments of the op, which the functions of `plain` are also called with.
    """
    import pytest  # imported here, since `op_table` does not need it

    benchmark.group = f"{op} {group}, {dtype}, B = {BATCH}{'' if backward else ', forward'}"
    run, in_dtype = forward_backward(op, arguments, backward), DTYPES[dtype]
    if name in plain:
        benchmark(run, plain[name], in_dtype)
        return
    if not (usable := backends.can_run(op, name))[0]:
        pytest.skip(usable[1])
    truth, ours = next(iter(plain.values())), functools.partial(cases.call, op)
    with backends.use(name):
        found = run(ours, in_dtype), run(truth, in_dtype), run(truth, torch.float32)
        assert_agree(*([t.float() for t in results] for results in found), in_dtype)
        benchmark(run, ours, in_dtype)

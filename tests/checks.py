"""Checks that the tests share, and the tolerance policy.

The result of an op is compared with the ground truth, which is the same expression in float64. Its error may be twice
the error of plain PyTorch in the same dtype, plus a few units in the last place. If only few numbers are compared, the
error of a single evaluation of plain PyTorch depends on chance. The largest error of several evaluations is then used,
with inputs `moved` by a rounding error, since any correct algorithm may differ by that much. Gathers, masks and counts
are compared bit for bit, with `torch.equal`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from calls import Call, public
from torch import Tensor

# Added to twice the error of plain PyTorch, in units of the dtype's epsilon times the norm of the truth: the error of a
# result of few numbers can by chance exceed twice that of PyTorch. In 3000 draws of small shapes, results and gradients
# of masked_patch_embed needed at most 3.2, for a gradient of a single number, and 0.7 for all others.
FEW_ULP = 4
AGAIN = 16  # number of evaluations of plain PyTorch if one is not enough


def assert_close_to_truth(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    name: str = "result",
    again: Callable[[], Iterable[Tensor]] = tuple,
) -> None:
    """Asserts |actual - truth| <= 2 |plain - truth| + FEW_ULP eps |truth|, in Euclidean norms of the whole tensors.

    NaN and infinities never pass.

    Args:
        actual: result of the op under test.
        plain: result of plain PyTorch, in the same dtype or one of its choice; eps is that of the coarser dtype.
        truth: result of the same expression in float64.
        name: name of the tensor for the message.
        again: returns results of plain PyTorch for `moved` inputs; called only if `plain` alone is not enough.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth is in {truth.dtype}"
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    truth = truth.detach().cpu()
    norm = truth.norm().item()
    eps = max(torch.finfo(t.dtype).eps for t in (actual, plain))

    def off(t: Tensor) -> float:
        return (t.detach().cpu().double() - truth).norm().item()

    error, reference = off(actual), off(plain)
    if not error <= 2 * reference + FEW_ULP * eps * norm:
        reference = max(reference, *map(off, again()), 0.0)
    bound = 2 * reference + FEW_ULP * eps * norm
    assert error <= bound, (
        f"{name}: off by {error:.3e}, plain PyTorch by {reference:.3e}, allowed {bound:.3e}, norm {norm:.3e}"
    )


def moved(inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Multiplies each floating-point number of the inputs by a random factor in (1 - eps, 1 + eps), and rounds it.

    eps is that of `dtype`, the dtype to which autocast rounds the inputs, or else that of each tensor.
    """

    def move(t: Tensor) -> Tensor:
        by = torch.finfo(dtype or t.dtype).eps * (2 * torch.rand(t.shape, dtype=torch.float64, device=t.device) - 1)
        return (t.detach().double() * (1 + by)).to(t.dtype)

    return [move(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]


def assert_all_close_to_truth(
    actual: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Calls `assert_close_to_truth` for each of several tensors."""
    for a, p, t, name in zip(actual, plain, truth, names, strict=True):
        assert_close_to_truth(a, p, t, name)


def opcheck(overload: Any, args: Sequence[Any], *, traced: bool) -> None:
    """Checks schema, autograd registration and fake tensors of `overload`, an op's `.default`. If `traced`, also checks
    tracing with dynamic shapes, which takes ten times as long and does not depend on the backend."""
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # On a GPU, PyTorch's own kernels add in any order.
    on_gpu = any(isinstance(arg, Tensor) and arg.is_cuda for arg in args)
    tolerances = {"rtol": 1e-3, "atol": 1e-4} if on_gpu else {}
    torch.library.opcheck(
        overload, tuple(args), test_utils=tests + ["test_aot_dispatch_dynamic"] * traced, **tolerances
    )


def gradcheck64(function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> None:
    """Compares gradients of all floating-point inputs with finite differences in float64, also with some undefined."""
    leaves = [
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    ]
    assert all(t.dtype == torch.float64 for t in leaves if isinstance(t, Tensor) and t.requires_grad)
    assert torch.autograd.gradcheck(function, leaves)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """Returns the same values in several memory layouts: contiguous, channels last, and as every other pixel of a
    larger tensor. "expanded" repeats the first entry with stride 0 in the first dimension."""
    larger = tensor.new_zeros([2 * size + 1 for size in tensor.shape])
    every_other = larger[tuple(slice(1, None, 2) for _ in tensor.shape)]
    every_other.copy_(tensor)
    return {
        "contiguous": tensor.contiguous(),
        "channels last": tensor.contiguous(memory_format=torch.channels_last),
        "every other": every_other,
        "expanded": tensor[:1].expand_as(tensor),
    }


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], cotangent: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Returns the function's result, and the gradients of sum(result * cotangent) for its floating-point inputs."""
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    result = function(*leaves)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    return result.detach(), list(torch.autograd.grad(result, wanted, cotangent.to(result.dtype)))


def in_dtype(inputs: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Converts every floating-point tensor of the inputs to `dtype`."""
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]


def check_op(
    plain: Callable[[Any], Tensor], op: str, arguments: Any, place: Any, dtype: torch.dtype, autocast: bool = False
) -> None:
    """Checks result and gradients of an op in `dtype`, or under autocast to it, against the tolerance policy.

    Args:
        plain: the op in plain PyTorch, as a function of the op's arguments.
        op, arguments: a call in float64, as `sgmim_fast.ops.cases` returns it.
        place: backend and device, see conftest.
    """
    call = Call(op, arguments, place.device)
    low = in_dtype(call.tensors, torch.float32 if autocast else dtype)
    cotangent = torch.randn_like(plain(call.arguments())).to(dtype).double()
    usual_way = call.by(plain)
    with torch.autocast(place.device, dtype) if autocast else contextlib.nullcontext():
        actual, usual = (gradients(function, low, cotangent) for function in (call.by(public(op)), usual_way))
    truth = gradients(usual_way, in_dtype(low, torch.float64), cotangent)
    assert actual[0].dtype == dtype and [g.dtype for g in actual[1]] == [t.dtype for t in low]

    def again(i: int) -> Iterator[Tensor]:
        for _ in range(AGAIN):
            with torch.autocast(place.device, dtype) if autocast else contextlib.nullcontext():
                result, grads = gradients(usual_way, moved(low, dtype), cotangent)
            yield [result, *grads][i]

    three = ([r, *g] for r, g in (actual, usual, truth))
    for i, (name, *tensors) in enumerate(zip(["result", *call.names], *three, strict=True)):
        assert_close_to_truth(*tensors, name, functools.partial(again, i))


PASSES = """
import os, sys, pytest, timm, torch
file, wanted, *sets = sys.argv[1:]
for isa in sets:  # in a process each, which has torch already
    if os.fork() == 0:
        os.environ["SGMIM_FAST_CPU_ISA"] = isa
        code = pytest.main(["-qx", "-p", "no:cacheprovider", "-k", wanted, file])
        sys.stdout.flush()
        os._exit(code)
    assert os.wait()[1] == 0, isa
"""


def assert_passes_with(sets: Sequence[str], file: str, wanted: str = "") -> None:
    """Asserts that the tests of a file pass in processes whose CPU kernels are limited to one instruction set each.

    Args:
        wanted: an expression for pytest's -k.
    """
    if os.environ.get("SGMIM_FAST_CPU_ISA"):
        pytest.skip("one is asked for")
    done = subprocess.run([sys.executable, "-c", PASSES, file, wanted, *sets], capture_output=True, text=True)
    passed = re.findall(r"^\d+ passed", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and len(passed) == len(sets), done.stdout[-3000:] + done.stderr[-1000:]

"""Checks that the tests share, and the tolerance policy.

An op in a low precision is not compared with another op in the same precision but with the truth, the same expression
in float64: its error may be twice that of plain PyTorch in the same dtype, plus a few units in the last place. Where
few numbers are compared, plain PyTorch's error in one evaluation is luck: it is then the largest of several, of inputs
that are `moved` by a rounding, which any correct algorithm may be off by. Gathers, masks and counts are compared bit
for bit, by `torch.equal`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from calls import Call, public
from torch import Tensor

# Added to twice plain PyTorch's error, in units of the dtype's epsilon, relative to the truth's norm: a result of few
# numbers can be off more than twice as much by chance. 3000 draws of small shapes for masked_patch_embed's results and
# gradients needed 3.2 at most, for a gradient of a single number, and 0.7 apart from those.
FEW_ULP = 4
AGAIN = 16  # evaluations of plain PyTorch, where one alone would not do


def assert_close_to_truth(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    name: str = "result",
    again: Callable[[], Iterable[Tensor]] = tuple,
) -> None:
    """Asserts |actual - truth| <= 2 |plain - truth| + FEW_ULP eps |truth|, Euclidean norms of the whole tensors.

    Args:
        actual: of the op under test.
        plain: of plain PyTorch, in the same dtype or in that of its own choice; eps is the coarser of the two dtypes'.
        truth: the same expression in float64.
        name: of the tensor, for the message. NaN and infinities never pass.
        again: plain PyTorch's results for `moved` inputs, asked for where `plain` alone would not do.
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
    """The inputs with each floating-point number moved by less than eps of itself, at random, and rounded.

    dtype: whose eps, if not that of each; what autocast rounds the inputs to.
    """

    def move(t: Tensor) -> Tensor:
        by = torch.finfo(dtype or t.dtype).eps * (2 * torch.rand(t.shape, dtype=torch.float64, device=t.device) - 1)
        return (t.detach().double() * (1 + by)).to(t.dtype)

    return [move(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]


def assert_all_close_to_truth(
    actual: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], names: Sequence[str]
) -> None:
    """`assert_close_to_truth` for each of several tensors."""
    for a, p, t, name in zip(actual, plain, truth, names, strict=True):
        assert_close_to_truth(a, p, t, name)


def opcheck(overload: Any, args: Sequence[Any], *, traced: bool) -> None:
    """Schema, autograd registration, fake tensors; and tracing with dynamic shapes, which takes ten times as long and
    does not see which backend computes. `overload`: an op's `.default`."""
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(overload, tuple(args), test_utils=tests + ["test_aot_dispatch_dynamic"] * traced)


def gradcheck64(function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> None:
    """Finite differences in float64 for every input of a floating dtype, also with some gradients undefined."""
    leaves = [
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    ]
    assert all(t.dtype == torch.float64 for t in leaves if isinstance(t, Tensor) and t.requires_grad)
    assert torch.autograd.gradcheck(function, leaves)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values contiguous, channels last, with every other pixel of a larger tensor, and with strides of zero
    for the first dimension (of its first entry, repeated)."""
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
    """The function's result, and the gradients of sum(result * cotangent) for the inputs that are floating-point."""
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    result = function(*leaves)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    return result.detach(), list(torch.autograd.grad(result, wanted, cotangent.to(result.dtype)))


def in_dtype(inputs: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The inputs with every floating-point tensor converted."""
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]


def check_op(
    plain: Callable[[Any], Tensor], op: str, arguments: Any, place: Any, dtype: torch.dtype, autocast: bool = False
) -> None:
    """Result and gradients of an op in `dtype`, or under autocast to it, by the tolerance policy.

    Args:
        plain: in plain PyTorch, a function of the op's arguments.
        op, arguments: a call, of float64 numbers, as `sgmim_fast.ops.cases` gives it.
        place: where it runs, see conftest.
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


def assert_passes_with(isa: str, file: str, wanted: str = "") -> None:
    """Asserts that the tests of a file pass with an instruction set of the CPU kernels, in a process that has no other.

    Args:
        wanted: as of pytest's -k.
    """
    if os.environ.get("SGMIM_FAST_CPU_ISA"):
        pytest.skip("one is asked for")
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", wanted, file]
    environment = os.environ | {"SGMIM_FAST_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]

"""Properties of every op, whatever it computes, for every kind of call in `calls.CALLS`.

Values, tolerances and messages are in the tests of each op, wrong arguments and strides in `test_arguments`.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from calls import CALLS, DIFFERENTIABLE, OPS, REGISTERED, Call
from checks import gradcheck64, gradients, opcheck
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops import gemm
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.primitives import Gradients

COMPOSED = [op for op in DIFFERENTIABLE if backends.composed(op)]


def calls(ops: list[str]) -> pytest.MarkDecorator:
    found = [pytest.param(op, make, id=f"{op}-{name}") for op in ops for name, make in CALLS[op].items()]
    return pytest.mark.parametrize(("op", "arguments"), found)


every_call = calls(OPS)
every_gradient = calls(DIFFERENTIABLE)


def given(call: Call, *wanted: int) -> tuple[Tensor, list[Tensor]]:
    """Returns the result and the tensors, of which those with these numbers require a gradient."""
    leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(call.tensors)]
    return call(*leaves), leaves


def cotangent_of(result: Tensor) -> Tensor:
    return (
        torch.linspace(-9, 7, result.numel(), dtype=torch.float64)
        .sin()
        .view(result.shape)
        .to(result.device, result.dtype)
    )


def results(call: Call) -> Any:
    """Returns the op's result, with gradients if it is differentiable."""
    result = call(*call.tensors)
    return gradients(call, call.tensors, cotangent_of(result)) if call.op in DIFFERENTIABLE else result


@every_gradient
def test_partial_gradients(place, op, arguments):
    """Gradients of one tensor, or of all but one, are those computed for all. No other tensor has a gradient."""
    call = Call(op, arguments(), place.device)
    every = range(len(call.tensors))
    result, leaves = given(call, *every)
    complete = torch.autograd.grad(result, leaves, cotangent := cotangent_of(result))
    for one in every:
        for wanted in {(one,), (*(i for i in every if i != one),)} - {()}:
            result, leaves = given(call, *wanted)
            result.backward(cotangent)
            for i, (name, leaf, expected) in enumerate(zip(call.names, leaves, complete, strict=True)):
                if i in wanted:
                    torch.testing.assert_close(leaf.grad, expected, msg=lambda text, n=name: f"{n}: {text}")
                else:
                    assert leaf.grad is None, name


@every_gradient
def test_a_backward_keeps_no_gradient(op, arguments):
    """A reference to a gradient, also one in a cycle, would make autograd copy it into `.grad`."""
    call = Call(op, arguments())
    gc.collect()
    gc.disable()
    try:
        result, _ = given(call, *range(len(call.tensors)))
        result.backward(cotangent_of(result))
        assert not any(isinstance(x, Gradients) for x in gc.get_objects())
    finally:
        gc.enable()


@every_call
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype(place, op, arguments, default):
    call = Call(op, arguments(), place.device)
    expected = results(call)
    torch.set_default_dtype(default)
    try:
        found = results(call)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@every_gradient
def test_no_gradient_is_asked_for(place, op, arguments):
    call = Call(op, arguments(), place.device)
    assert not given(call)[0].requires_grad
    with torch.no_grad():
        assert not given(call, *range(len(call.tensors)))[0].requires_grad


@every_gradient
def test_gradients_that_are_not_contiguous(place, op, arguments):
    call = Call(op, arguments(), place.device)
    cotangent = cotangent_of(given(call)[0])
    if cotangent.ndim == 0:
        cotangent = cotangent.expand(3)
    first = tuple(slice(1) for _ in cotangent.shape)
    strided = {
        "expanded": cotangent[first].expand_as(cotangent),
        "transposed": cotangent.transpose(0, -1).contiguous().transpose(0, -1),
        "every other": cotangent.repeat_interleave(2, -1)[..., ::2],
    }
    for name, grad in strided.items():
        contiguous = grad.contiguous()
        _, expected = gradients(lambda *leaves: call(*leaves).expand_as(grad), call.tensors, contiguous)  # noqa: B023
        result, leaves = given(call, *range(len(call.tensors)))
        actual = torch.autograd.grad(result.expand_as(grad), leaves, grad)
        # The order of summation may differ.
        torch.testing.assert_close(list(actual), expected, rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


@every_call
def test_inputs_that_are_not_contiguous(place, op, arguments):
    call = Call(op, arguments(), place.device)
    expected = results(call)
    for i, t in enumerate(call.flat):
        if isinstance(t, Tensor):
            call.flat[i] = t.repeat_interleave(3)[::3] if t.ndim == 1 else t.movedim(0, -1).contiguous().movedim(-1, 0)
    call.tensors = [call.flat[i] for i in call.at]
    torch.testing.assert_close(results(call), expected, rtol=1e-5, atol=1e-5)  # a gemm may take another path


@every_gradient
def test_gradcheck(op, arguments):
    """Tests the torch backend, also with some gradients undefined."""
    torch.manual_seed(0)
    call = Call(op, arguments(make=FLOAT64))
    with backends.use("torch"):
        gradcheck64(call, call.tensors)


def in_lists(call: Call, dtype: torch.dtype | None, *tensors: Tensor) -> list:
    """Returns the arguments of the op's call, as under autocast to `dtype`."""
    args = [list(group) if isinstance(group, tuple) else group for group in call.arguments(*tensors)]
    return args if dtype is None else [*args[:-1], dtype]


@every_call
def test_opcheck(place, op, arguments):
    call = Call(op, arguments(), place.device)
    leaves = [t.clone().requires_grad_(op in DIFFERENTIABLE) for t in call.tensors]
    opcheck(REGISTERED[op].overload, in_lists(call, None, *leaves), traced=place.backend == "torch")


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, None) for op in COMPOSED] + [(op, torch.bfloat16) for op in COMPOSED if REGISTERED[op].declared.takes_dtype],
)
def test_opcheck_of_the_backward(place, op, dtype):
    """Tests the forward, and the backward with all and with every second gradient, also with the dtype of autocast."""
    registered, call = REGISTERED[op], Call(op, CALLS[op]["everything"](), place.device)
    args, traced = in_lists(call, dtype), place.backend == "torch"
    with gemm.compute_bfloat16_in(torch.bfloat16):
        opcheck(registered.overload, args, traced=traced)
        result = registered.overload(*args)
        result, saved = result if isinstance(result, tuple) else (result, [])
        layout = registered.declared.layout(call.lengths)
        for step in (1, 2):  # a residual's gradient is the incoming one
            needs = [i in call.at[::step] and layout.names[i] != "residual" for i in layout.places]
            opcheck(registered.backward_overload, [result, *args, saved, needs], traced=traced)


@every_call
def test_autocast_leaves_float64_alone(place, op, arguments):
    call = Call(op, arguments(make=FLOAT64), place.device)
    with backends.use("torch"):
        expected = call(*call.tensors)
        with torch.autocast(place.device, torch.bfloat16):
            actual = call(*call.tensors)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_call
def test_same_bits_each_time(place, op, arguments):
    call = Call(op, arguments(), place.device)
    torch.testing.assert_close(results(call), results(call), rtol=0, atol=0)

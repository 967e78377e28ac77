"""Derivatives that ops do not support (forward-mode, second order, torch.func), and the backend of the backward."""

from __future__ import annotations

import threading

import pytest
import torch
from calls import DIFFERENTIABLE, OPS, example, overload
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from sgmim_fast import backends
from sgmim_fast.ops import gemm, norm_linear
from sgmim_fast.ops._op import _CARRIED

SPECS = {op: pytree.tree_flatten(example(op))[1] for op in OPS}


def floating(op: str) -> list[int]:
    """Returns which of the flat arguments are floating-point tensors."""
    flat = pytree.tree_leaves(example(op))
    return [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def first_result(op: str, flat: list) -> Tensor:
    results = overload(op)(*pytree.tree_unflatten(flat, SPECS[op]))
    return results[0] if isinstance(results, tuple) else results


@pytest.mark.parametrize("op", [op for op in OPS if op != "selective_mask"])
def test_forward_mode_raises_for_every_argument(op):
    for at in floating(op):
        flat = pytree.tree_leaves(example(op))

        def function(x, flat=flat, at=at):
            return first_result(op, [*flat[:at], x, *flat[at + 1 :]])

        x = flat[at]
        message = f"sgmim_fast.ops.{op} has no forward-mode derivative"
        with forward_ad.dual_level():
            for requires_grad in (False, op in DIFFERENTIABLE):
                dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), torch.ones_like(x))
                with pytest.raises(NotImplementedError, match=message):
                    function(dual)
            function(x)  # without a tangent
        for transform in (lambda f, x=x: torch.func.jvp(f, (x,), (x,)), lambda f, x=x: torch.func.jacfwd(f)(x)):
            with pytest.raises(NotImplementedError, match=message):
                transform(function)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_torch_func_raises(op):
    flat, at = pytree.tree_leaves(example(op)), floating(op)[0]
    with pytest.raises(NotImplementedError, match=f"sgmim_fast.ops.{op} has no derivative in torch.func"):
        torch.func.grad(lambda x: first_result(op, [*flat[:at], x, *flat[at + 1 :]]).sum())(flat[at])


@pytest.mark.parametrize("linear", [True, False], ids=["constant cotangent", "cotangent with a gradient"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_second_derivative_raises_or_is_right_for_every_argument(op, linear):
    """Also if the incoming gradient does not require one itself, because saved tensors do."""
    for at in floating(op):
        flat = pytree.tree_leaves(example(op))
        x = flat[at] = flat[at].requires_grad_()
        result = first_result(op, flat)
        loss = (result if linear else result.square()).sum() + x.square().sum()
        (once,) = torch.autograd.grad(loss, x, create_graph=True)
        (plain,) = torch.autograd.grad((first_result(op, flat) if linear else first_result(op, flat).square()).sum(), x)
        torch.testing.assert_close(once.detach(), plain + 2 * x.detach())
        try:
            (twice,) = torch.autograd.grad(once.sum(), x)
        except RuntimeError as error:
            assert f"sgmim_fast.ops.{op} has no second derivative" in str(error)
            continue
        # right if the gradient does not depend on x
        torch.testing.assert_close(twice, torch.full_like(x, 2))
        flat[at] = (2 * x + 1).detach().requires_grad_()
        result = first_result(op, flat)
        (elsewhere,) = torch.autograd.grad((result if linear else result.square()).sum(), flat[at])
        torch.testing.assert_close(elsewhere, plain, msg=f"argument {at}")


def test_create_graph_elsewhere_is_untouched():
    """A penalty on the gradient of another computation is not affected."""
    x, weight, scale = torch.randn(4, 6), torch.randn(5, 6, requires_grad=True), torch.ones((), requires_grad=True)
    loss = norm_linear(x, weight).sum() + scale**3
    (slope,) = torch.autograd.grad(loss, scale, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(slope, scale)[0], torch.tensor(6.0))


def seen(monkeypatch) -> list[tuple[str, str, str | None]]:
    """Returns a list of (part, backend, compute dtype of bfloat16) of all later calls of a backend."""
    calls, implementation = [], backends.implementation

    def record(op, part, backend):
        calls.append((part, backend, gemm.BFLOAT16_IN.get()))
        return implementation(op, part, backend)

    monkeypatch.setattr(backends, "implementation", record)
    monkeypatch.setattr(backends, "state", lambda: None)  # no choice of an earlier call is used again
    return calls


def test_the_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    calls, x = seen(monkeypatch), torch.randn(4, 6, requires_grad=True)
    with backends.use("torch"), gemm.compute_bfloat16_in(torch.float32):
        inside = norm_linear(x, torch.randn(5, 6)).sum()
    outside = norm_linear(x, torch.randn(5, 6)).sum()
    thread = threading.Thread(target=inside.backward)  # as autograd's own thread on a GPU
    thread.start()
    thread.join()
    with backends.use("torch"):
        outside.backward()
    default = next(name for name in backends.ORDER["cpu"] if backends.available()[name][0])
    torch_, own = ("torch", torch.float32), (default, None)
    assert calls == [("forward", *torch_), ("forward", *own), ("backward", *torch_), ("backward", *own)]
    assert [variable.get() for variable in _CARRIED] == [None, None]


def test_threads_have_backends_of_their_own():
    """Three threads enter and leave contexts alternately, and none is affected by another."""
    wrong, names, meet = [], ("torch", "cpu", "triton"), threading.Barrier(3)

    def work(name):
        for _ in range(100):
            meet.wait()
            with backends.use(name):
                meet.wait()
                wrong.extend([name] if backends.forced() != name else [])
                meet.wait()
            wrong.extend(["none"] if backends.forced() is not None else [])

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def train(backend: str, steps: int = 20) -> list[Tensor]:
    """Returns parameters after a few steps of gradient descent through a norm, a linear layer and an L1 loss."""
    generator = torch.Generator().manual_seed(0)
    x, weight, norm_weight, norm_bias, bias = (
        torch.randn(s, generator=generator) for s in [(8, 6), (5, 6), (6,), (6,), (5,)]
    )
    leaves = [t.requires_grad_() for t in (weight, norm_weight, norm_bias, bias)]
    with backends.use(backend):
        for _ in range(steps):
            weight, norm_weight, norm_bias, bias = leaves
            loss = norm_linear(x, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias).square().mean()
            grads = torch.autograd.grad(loss, leaves)
            leaves = [(t - 0.05 * g).detach().requires_grad_() for t, g in zip(leaves, grads, strict=True)]
    return leaves


def test_three_threads_train_at_once(threads):
    """Each thread has its own backend, and computes the same bits as it does alone."""
    usable = [
        name for name in ("torch", "cpu", "triton") if backends.can_run("norm_linear", name, torch.zeros(1, 1))[0]
    ]
    names = (usable * 3)[:3]
    with threads(1):
        alone = {name: train(name) for name in set(names)}
        together = [None] * 3

        def work(i):
            together[i] = train(names[i])

        workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for name, result in zip(names, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, alone[name], strict=True)), name

"""A loss whose gradients are computed in its forward, so that no activations are kept for the backward.

A loss is a scalar, so the backward only has to multiply these gradients by the gradient of the scalar. Computing them
early costs nothing if the loss's forward is the last part of the step's. It frees the loss's activations before other
parts of the step allocate memory, and it allows a batch to be processed in pieces, one at a time in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgmim_fast.ops._op import once


def fits(parts: Iterable[nn.Module], dtype: torch.dtype) -> bool:
    """Whether early gradients are indistinguishable from ordinary ones: gradients are enabled, no graph is traced,
    modules and parameters have no hooks, and `dtype` is not float16, whose gradients need a loss scale beforehand."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or dtype == torch.float16:
        return False
    for module in (module for part in parts for module in part.modules()):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if any(p is not None and p._backward_hooks for p in module._parameters.values()):
            return False
    return True


def early_gradients(
    losses: Sequence[Callable[..., Tensor]], inputs: Sequence[Tensor], parts: Iterable[nn.Module]
) -> Tensor:
    """Computes the sum of losses and, at once, its gradients, one loss after the other.

    Args:
        losses: functions that are called with `inputs` and return a scalar.
        inputs: tensors that the losses depend on.
        parts: modules whose parameters the losses depend on; see `fits`.

    Returns:
        The sum, a scalar; differentiable once with respect to inputs and parameters.
    """
    parameters = list({id(p): p for part in parts for p in part.parameters()}.values())
    return _Early.apply(losses, len(inputs), *inputs, *parameters)


class _Early(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Sequence[Callable[..., Tensor]], count: int, *tensors: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip(tensors[:count], needs, strict=False)]
        leaves = [t for t, n in zip((*inputs, *tensors[count:]), needs, strict=True) if n]
        total, found = None, None
        for function in losses:
            with torch.enable_grad():
                loss = function(*inputs)
            grads = _unshared(torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ())
            loss = loss.detach()
            total, found = (loss, grads) if total is None else (total + loss, _add_in_place(found, grads))
        ctx.save_for_backward(*tensors)
        ctx.needs, ctx.found = needs, found
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        # saved_tensors raises if a tensor was changed in place, or if the graph was freed by an earlier backward
        found = iter(ctx.found)
        kept = [next(found) if need else None for _, need in zip(ctx.saved_tensors, ctx.needs, strict=True)]
        if torch._C._autograd._get_current_graph_task_keep_graph():
            scaled = [None if g is None else g * grad for g in kept]
        else:
            scaled = [None if g is None else g.mul_(grad) for g in kept]
            ctx.found = ()
        if torch.is_grad_enabled():  # create_graph=True
            scaled = once("linear_l1", scaled, ctx, grad)
        return None, None, *scaled


def _unshared(grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Returns gradients that can be changed in place: contiguous, and not sharing memory, as an addition's two do."""
    found: list[Tensor | None] = []
    seen = set()
    for grad in grads:
        if grad is not None:
            place = grad.untyped_storage()._cdata
            grad = grad if grad.is_contiguous() and place not in seen else grad.clone()
            seen.add(place)
        found.append(grad)
    return found


def _add_in_place(first: Iterable[Tensor | None], second: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Adds two lists of gradients, in place into the first."""
    pairs = zip(first, second, strict=True)
    return [b if a is None else a if b is None else a.add_(b) for a, b in pairs]

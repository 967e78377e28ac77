"""Gradients of several processes: their mean, for training steps that DistributedDataParallel cannot contain.

The hooks of DistributedDataParallel keep the nodes that accumulate gradients on the stream of its construction, so a
backward pass with them cannot be captured. Here gradients are averaged after the backward pass, captured or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 32 << 20  # bytes of gradients that are sent together


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Copies the values of the group's first process to all others, in place. Every process must call it."""
    source = dist.get_global_rank(group, 0)
    for tensor in tensors:
        values = tensor.detach().contiguous()
        dist.broadcast(values, source, group=group)
        if values.data_ptr() != tensor.data_ptr():
            tensor.copy_(values)


class Averaging:
    """Replaces gradients by their mean over the processes of a group.

    As in DistributedDataParallel, gradients are divided by the number of processes and then summed, in buckets. A
    parameter has a gradient if any process has one; a process without one contributes zeros. Which parameters these are
    is exchanged at the first call, and again after `requires_grad` has changed.

    Args:
        parameters: the parameters, in the same order on every process.
        group: the processes, each of which must call the object equally often.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
        self._parameters, self._group = list(parameters), group
        self._trained: list[bool] = []  # requires_grad of each parameter at the last exchange
        self._buckets: list[list[nn.Parameter]] = []  # the parameters that have gradients
        self._others: dict[int, nn.Parameter] = {}  # by their places

    @torch.no_grad()
    def __call__(self) -> None:
        """Averages the gradients in place. Does not synchronise with a GPU, except after an exchange.

        Raises:
            RuntimeError: a parameter had no gradient on any process at the last exchange, and has one now.
        """
        trained = [p.requires_grad for p in self._parameters]
        if trained != self._trained:
            self._exchange()
            self._trained = trained
        for place, p in self._others.items():
            if p.grad is not None:
                raise RuntimeError(
                    f"parameter {place}, of shape {tuple(p.shape)}, has a gradient that no process had when gradients "
                    "were first averaged; expected gradients of the same parameters in every step"
                )
        for bucket in self._buckets:
            for p in bucket:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            grads = [p.grad for p in bucket]
            flat = torch.cat([grad.flatten() for grad in grads]).div_(self._group.size())
            dist.all_reduce(flat, group=self._group)
            means = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [mean.view(grad.shape) for mean, grad in zip(means, grads, strict=True)])

    def _exchange(self) -> None:
        """Finds the parameters that have a gradient on any process."""
        here = [place for place, p in enumerate(self._parameters) if p.grad is not None]
        everywhere: list[list[int]] = [[] for _ in range(self._group.size())]
        dist.all_gather_object(everywhere, here, group=self._group)
        places = {place for each in everywhere for place in each}
        self._buckets = list(_buckets([p for place, p in enumerate(self._parameters) if place in places]))
        self._others = {place: p for place, p in enumerate(self._parameters) if place not in places}


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Divides parameters, whose gradients have their dtype, into lists of one dtype and at most BUCKET bytes, or one
    larger parameter."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in sorted(parameters, key=lambda p: str(p.dtype)):  # stable: otherwise in their order
        if bucket and (p.dtype != bucket[0].dtype or size + p.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.nbytes
    if bucket:
        yield bucket

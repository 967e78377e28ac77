"""The exponential moving average of a model's parameters, which replaces them in evaluation, pictures and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sgmim_fast.engine import checkpoint


class Average:
    """Computes average <- decay * average + (1 - decay) * parameter after every step.

    The decay is at most (1 + step) / (10 + step), which reduces the weight of the initial parameters.

    Args:
        model: the model whose parameters are averaged.
        decay: decay per step, greater than 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, model
        self.tensors = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the averages after a step, numbered from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.tensors, list(self.model.parameters()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager in which the model's parameters have the averages as values. They are copied in place, since
        CUDA graphs use the parameters' addresses."""
        parameters = list(self.model.parameters())
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.tensors)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Returns the averages on the CPU, as a part of a checkpoint."""
        names = [name for name, _ in self.model.named_parameters()]
        return {checkpoint.AVERAGE: {name: tensor.cpu() for name, tensor in zip(names, self.tensors, strict=True)}}

    def restore(self, path: Path) -> None:
        """Loads the averages of a checkpoint. If it has none, the averages start from the model's parameters."""
        saved = checkpoint.averages(path)
        for (name, parameter), tensor in zip(self.model.named_parameters(), self.tensors, strict=True):
            tensor.copy_(saved.get(name, parameter.detach()))

"""The exponential moving average of a model's parameters, which is tested, drawn and exported in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sgmim_fast.engine import checkpoint


class Average:
    """average <- decay * average + (1 - decay) * parameter, after every step.

    Over the first steps the decay is at most (1 + step) / (10 + step), so that the random start is soon forgotten.

    Args:
        model: of whose parameters.
        decay: more than 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, model
        self.tensors = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of that number, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.tensors, list(self.model.parameters()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages. In place: a CUDA graph knows where its parameters are."""
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
        """For a checkpoint, on the CPU."""
        names = [name for name, _ in self.model.named_parameters()]
        return {checkpoint.AVERAGE: {name: tensor.cpu() for name, tensor in zip(names, self.tensors, strict=True)}}

    def restore(self, path: Path) -> None:
        """Of a checkpoint; where that has none, the average starts from its parameters."""
        saved = checkpoint.averages(path)
        for (name, parameter), tensor in zip(self.model.named_parameters(), self.tensors, strict=True):
            tensor.copy_(saved.get(name, parameter.detach()))

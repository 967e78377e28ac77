"""The exponential moving average of a model's parameters, which is tested, drawn and exported in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sgmim_fast.engine import checkpoint

PART = "average"  # of a checkpoint


class Average:
    """average <- decay * average + (1 - decay) * parameter, after every step.

    Over the first steps the decay is at most (1 + step) / (10 + step), so that the random start is soon forgotten.

    Args:
        model: of whose parameters.
        decay: 0: there is none, and the parameters themselves are used.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, model
        self.tensors = [p.detach().clone() for p in model.parameters()] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of that number, from 0."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.tensors, list(self.model.parameters()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages. In place: a CUDA graph knows where its parameters are."""
        if not self.decay:
            yield
            return
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
        if not self.decay:
            return {}
        names = [name for name, _ in self.model.named_parameters()]
        return {PART: {name: tensor.cpu() for name, tensor in zip(names, self.tensors, strict=True)}}

    def restore(self, path: Path) -> None:
        """Of a checkpoint; where that has none, the average starts from its parameters."""
        if not self.decay:
            return
        saved = read(path)
        for (name, parameter), tensor in zip(self.model.named_parameters(), self.tensors, strict=True):
            tensor.copy_(saved.get(name, parameter.detach()))


def read(path: Path) -> dict[str, Tensor]:
    """The averages in a checkpoint; {} where there are none."""
    return checkpoint.read(path, PART) if (path / f"{PART}.safetensors").is_file() else {}

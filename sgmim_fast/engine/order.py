"""Which images a step has, from the seed alone: the same for any number of processes, and known when resuming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """One seed from several numbers, each change of which changes it altogether."""
    numbers = (*numbers, 1)  # zeros at the end would not count
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Layout:
    """How the images of a step are dealt out: first to the backwards, then to the processes."""

    batch: int  # per process and backward
    accumulate: int = 1  # backwards per step
    processes: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """Images of a step."""
        return self.batch * self.accumulate * self.processes

    def first(self, backward: int) -> int:
        """Place in the step's images of this process's first one of that backward."""
        return (backward * self.processes + self.rank) * self.batch


class Order:
    """Batches of indices of this process in one epoch, from a step of it on; a `batch_sampler`.

    An epoch is a permutation of the data set drawn from (seed, epoch), cut into steps; what is left over is dropped.
    """

    def __init__(self, length: int, layout: Layout, seed: int, epoch: int, step: int = 0):
        self.length, self.layout, self.seed, self.epoch, self.step = length, layout, seed, epoch, step

    def __len__(self) -> int:
        return (self.length // self.layout.total - self.step) * self.layout.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mix(self.seed, 1, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        for step in range(self.step, self.length // self.layout.total):
            images = order[step * self.layout.total :]
            for backward in range(self.layout.accumulate):
                first = self.layout.first(backward)
                yield images[first : first + self.layout.batch].tolist()

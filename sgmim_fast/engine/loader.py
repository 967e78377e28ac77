"""Which images a step has, from the seed alone: the same for any number of processes; and their batches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from sgmim_fast.data.seeds import mix
from sgmim_fast.engine.launch import SIGNALS
from sgmim_fast.errors import UserError


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
        generator = torch.Generator().manual_seed(mix(self.seed, "order", self.epoch))
        order = torch.randperm(self.length, generator=generator)
        for step in range(self.step, self.length // self.layout.total):
            images = order[step * self.layout.total :]
            for backward in range(self.layout.accumulate):
                first = self.layout.first(backward)
                yield images[first : first + self.layout.batch].tolist()


def batches(
    dataset: Dataset, layout: Layout, seed: int, step: int, steps_per_epoch: int, workers: int, pin: bool
) -> Iterator[dict[str, Any]]:
    """This process's batches from a step on, without end: items of `sgmim_fast.data`, collated.

    A data set of known length goes on exactly where another call would be by then. One that only iterates (shards)
    starts a new pass, in an order of its own, so resuming it repeats nothing but is not exact either.
    """
    options = {
        "workers": workers,
        "pin_memory": pin,
        "generator": torch.Generator().manual_seed(mix(seed, "loader", step)),  # the default generator is left alone
    }
    # a loader for each epoch: workers are copies of the data set and would not see a later set_epoch
    if isinstance(dataset, IterableDataset):
        for each in count(step):  # a number that no earlier pass had
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(each)
            yield from read(dataset, batch_size=layout.batch, drop_last=True, **options)
    for epoch in count(step // steps_per_epoch):
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        first = step % steps_per_epoch if epoch == step // steps_per_epoch else 0
        yield from read(dataset, batch_sampler=Order(len(dataset), layout, seed, epoch, first), **options)


def read(dataset: Dataset, workers: int, **options: Any) -> Iterator[dict[str, Any]]:
    """One pass of a DataLoader, whose workers leave signals to the parent and end with this, whatever ends it."""
    batches = iter(DataLoader(dataset, num_workers=workers, worker_init_fn=_leave_signals_to_the_parent, **options))
    try:
        yield from batches
    finally:
        # an error's traceback keeps `batches` alive to the end of the process, which waits for workers that ignore it
        if workers:
            batches._shutdown_workers()


def steps_per_epoch(settings: Any, dataset: Dataset, layout: Layout) -> int:
    """Optimizer steps of an epoch; what does not fill a step is left out.

    Args:
        settings: the section "data"; its `epoch_images` counts for a data set that only iterates.

    Raises:
        UserError: the data set does not fill one.
    """
    items = settings.epoch_images if isinstance(dataset, IterableDataset) else len(dataset)
    if items < layout.total:
        raise UserError(
            f"the data has {items} images, fewer than the {layout.total} of a step ({layout.batch} for each of "
            f"{layout.processes} processes, {layout.accumulate} times); expected a smaller optim.batch"
        )
    return items // layout.total


def workers(settings: Any) -> int:
    """Loading processes for each training process: what the cores allow, at most 8, unless the section "data" says."""
    if settings.workers is not None:
        return settings.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def examples(dataset: Dataset, number: int) -> dict[str, Any]:
    """A batch to look at, the same at every call: items from all over the data set, or the first ones of shards."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)
    if isinstance(dataset, IterableDataset):
        return default_collate(list(islice(iter(dataset), number)))
    return default_collate([dataset[index] for index in spread(len(dataset), number)])


def spread(length: int, number: int) -> list[int]:
    """So many of the indices below `length`, or all, from all over it."""
    number = min(number, length)
    return [i * length // number for i in range(number)]


def _leave_signals_to_the_parent(worker: int) -> None:
    """A cluster and a terminal send signals to every process: workers go when the training has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

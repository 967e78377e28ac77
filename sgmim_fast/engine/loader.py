"""Loads the batches of a training. The order of images depends only on the seed, for any number of processes."""

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
    """How the images of an optimizer step are split: over accumulated backward passes, then over processes."""

    batch: int  # images per process and backward pass
    accumulate: int = 1  # gradient accumulation: backward passes per optimizer step
    processes: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """Number of images of an optimizer step."""
        return self.batch * self.accumulate * self.processes

    def first(self, backward: int) -> int:
        """Returns the index, among the step's images, of this process's first image in a backward pass."""
        return (backward * self.processes + self.rank) * self.batch


class Order:
    """A `batch_sampler` with this process's batches of one epoch, starting at a given step.

    An epoch is a permutation of the data set drawn from (seed, epoch) and cut into steps; the remainder is dropped.
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
    """Yields this process's batches from a step on, without end: collated items of `sgmim_fast.data`.

    Resuming at a step gives exactly the batches of an uninterrupted run if the data set is map-style. An iterable one
    (shards) starts a new pass in a new order.

    Raises:
        UserError: a pass over an iterable data set does not fill a batch.
    """
    options = {
        "workers": workers,
        "pin_memory": pin,
        "generator": torch.Generator().manual_seed(mix(seed, "loader", step)),  # else it uses the default generator
    }
    # There is one DataLoader per epoch, since workers have copies of the data set and miss a later set_epoch.
    if isinstance(dataset, IterableDataset):
        for each in count(step):  # epoch numbers that no earlier pass had
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(each)
            nothing = True
            for batch in whole(read(dataset, batch_size=layout.batch, **options), layout.batch):
                nothing = False
                yield batch
            if nothing:
                raise UserError(
                    f"a pass over the data has fewer images than the {layout.batch} of a batch; expected a smaller "
                    "optim.batch, or more data"
                )
    for epoch in count(step // steps_per_epoch):
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        first = step % steps_per_epoch if epoch == step // steps_per_epoch else 0
        yield from read(dataset, batch_sampler=Order(len(dataset), layout, seed, epoch, first), **options)


def read(dataset: Dataset, workers: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Yields one pass of a DataLoader. Workers ignore signals, and are shut down when the iterator ends in any way."""
    batches = iter(DataLoader(dataset, num_workers=workers, worker_init_fn=_leave_signals_to_the_parent, **options))
    try:
        yield from batches
    finally:
        # The traceback of an error would keep `batches` and its workers alive. They ignore signals, and the process
        # would wait for them at its end.
        if workers:
            batches._shutdown_workers()


def whole(batches: Iterator[dict[str, Any]], size: int) -> Iterator[dict[str, Any]]:
    """Yields the batches of `size` items, and collates the items of smaller ones to batches of this size. An incomplete
    last batch is dropped.

    `drop_last` would drop one batch of each worker, since workers read their own shards.
    """
    rest: list[dict[str, Any]] = []
    for batch in batches:
        count = len(batch["name"])
        if count == size:
            yield batch
            continue
        rest += [{key: values[index] for key, values in batch.items()} for index in range(count)]
        if len(rest) >= size:
            yield default_collate(rest[:size])
            del rest[:size]


def steps_per_epoch(settings: Any, dataset: Dataset, layout: Layout) -> int:
    """Returns the number of optimizer steps per epoch. An incomplete last step is dropped.

    Args:
        settings: the section "data", whose `epoch_images` is the length of an iterable data set.

    Raises:
        UserError: the data set does not fill one step.
    """
    items = settings.epoch_images if isinstance(dataset, IterableDataset) else len(dataset)
    if items < layout.total:
        raise UserError(
            f"the data has {items} images, fewer than the {layout.total} of a step ({layout.batch} for each of "
            f"{layout.processes} processes, {layout.accumulate} times); expected a smaller optim.batch"
        )
    return items // layout.total


def workers(settings: Any) -> int:
    """Returns the number of workers per training process: the setting in the section "data", or one less than the
    process's share of cores, at most 8."""
    if settings.workers is not None:
        return settings.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def examples(dataset: Dataset, number: int) -> dict[str, Any]:
    """Returns a batch for pictures, the same at every call: evenly spaced items, or the first ones of shards."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)
    if isinstance(dataset, IterableDataset):
        return default_collate(list(islice(iter(dataset), number)))
    return default_collate([dataset[index] for index in spread(len(dataset), number)])


def spread(length: int, number: int) -> list[int]:
    """Returns at most `number` evenly spaced indices below `length`."""
    number = min(number, length)
    return [i * length // number for i in range(number)]


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignores signals in a worker. Clusters and terminals signal every process, but workers must not end before the
    parent has saved a checkpoint."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

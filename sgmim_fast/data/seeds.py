"""Randomness that depends on the run's seed and on what it is for alone: not on processes, nor on what ran before."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch


def mix(*parts: int | str) -> int:
    """One seed of several parts, as in `mix(seed, "masks", step)`, each change of which changes it altogether."""
    known = repr([part if isinstance(part, str) else int(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(known.encode(), digest_size=7).digest(), "big")


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `mix(*numbers)`; afterwards it is as before."""
    generator = torch.default_generator  # torch.manual_seed would seed the devices too
    before = generator.get_state()
    generator.manual_seed(mix(*numbers))
    try:
        yield
    finally:
        generator.set_state(before)


class Epoch:
    """The number of an epoch in shared memory, so that running workers of a DataLoader see it change."""

    def __init__(self) -> None:
        self._number = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; expected 0 or more")
        self._number.fill_(epoch)

    def get(self) -> int:
        return int(self._number)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._number.share_memory_()  # a copy is not shared by itself; one sent to a worker is already


class Seeded:
    """A data set whose random transforms depend on (seed, epoch, item)."""

    def __init__(self, seed: int):
        if seed < 0:
            raise ValueError(f"seed is {seed}; expected 0 or more")
        self.seed = seed
        self._epoch = Epoch()

    def set_epoch(self, epoch: int) -> None:
        """Call it between epochs: items of another epoch get other crops. Reaches workers that are already running."""
        self._epoch.set(epoch)

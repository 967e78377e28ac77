"""Seeds random numbers from the run's seed and their purpose alone, independent of processes and earlier calls."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch


def mix(*parts: int | str) -> int:
    """Hashes several parts into one seed of 56 bits, for example `mix(seed, "masks", step)`."""
    known = repr([part if isinstance(part, str) else int(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(known.encode(), digest_size=7).digest(), "big")


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Context manager that seeds torch's CPU generator with `mix(*numbers)`, and restores its state afterwards."""
    generator = torch.default_generator  # torch.manual_seed would also seed the devices
    before = generator.get_state()
    generator.manual_seed(mix(*numbers))
    try:
        yield
    finally:
        generator.set_state(before)


class Epoch:
    """The epoch number, in shared memory, so that running DataLoader workers see its changes."""

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
        self._number.share_memory_()  # for deep copies; what a worker unpickles refers to the shared memory already


class Seeded:
    """Base class of data sets whose random transforms depend on (seed, epoch, item)."""

    def __init__(self, seed: int):
        if seed < 0:
            raise ValueError(f"seed is {seed}; expected 0 or more")
        self.seed = seed
        self._epoch = Epoch()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which random transforms depend. Running workers see the change."""
        self._epoch.set(epoch)

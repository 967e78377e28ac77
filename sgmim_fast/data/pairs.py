"""Base class of map-style data sets of pairs, which skips broken files and seeds random transforms."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from sgmim_fast.data.image_file import ImageFile
from sgmim_fast.data.report import BrokenFile, DataError, Report
from sgmim_fast.data.seeds import Epoch, Seeded, seeded
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.data.transform import Normalize, decode, transformed

SAMPLED = 8  # number of pairs that the constructor reads
MAX_BROKEN = 100  # number of consecutive broken pairs after which an item raises

Pair = tuple[ImageFile | Tensor] | tuple[ImageFile | Tensor, StructureFile | Tensor]


class Pairs(Seeded, Dataset, ABC):
    """Map-style data set of pairs of an image and a map, which skips broken ones.

    The constructor reads some pairs, and raises if all of them are broken. A pair that turns out to be broken later is
    replaced by the next good one, and named in the item's "skipped".

    Args:
        transform: callable that takes (image, map) and returns both. None: `Normalize`.
        seed: seed of the transform, whose random numbers depend on (seed, epoch, index).
    """

    def __init__(self, transform: Callable[..., Sequence[Tensor]] | None, seed: int) -> None:
        super().__init__(seed)
        self.transform = Normalize() if transform is None else transform
        self.report = Report()
        # An array of numbers or bytes: forked workers share its memory, but copy that of Python objects.
        self._entries = np.empty(0, dtype=np.int64)

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns the "name" of an item."""

    @abstractmethod
    def _read(self, index: int) -> Pair:
        """Reads a pair. Raises BrokenFile."""

    @abstractmethod
    def _item(self, tensors: Sequence[Tensor], name: str, skipped: Sequence[str]) -> Any:
        """Makes an item of the transform's outputs."""

    def _use(self, entries: np.ndarray) -> None:
        """Sets the entries of the data set, and reads a few of them. Raises DataError if all of these are broken."""
        self._entries = entries
        self.report.used = len(self)
        self._try_some()

    def _sampled(self) -> list[int]:
        return np.unique(np.linspace(0, len(self) - 1, SAMPLED).astype(int)).tolist()

    def _try_some(self) -> None:
        tried = self._sampled()
        faults = [broken for index in tried if (broken := self._fault(index)) is not None]
        self.report.broken.update({broken.name: broken.reason for broken in faults})
        if len(faults) == len(tried):
            raise DataError(f"none of {len(tried)} pairs tried can be used; the last: {faults[-1]}")

    def _fault(self, index: int) -> BrokenFile | None:
        """Reads a pair and returns its error, or None; counts its storage formats in `report`."""
        try:
            pair = self._read(index)
            decode(*pair)
        except BrokenFile as broken:
            return broken
        self.report.kinds.update(kinds(*pair))
        return None

    def verify(self) -> Iterator[int]:
        """Reads every pair, removes the broken ones, and updates `report`.

        Call this before workers start: `for done in dataset.verify(): ...`.

        Yields:
            The number of pairs read so far, for a progress bar.

        Raises:
            DataError: all pairs are broken.
        """
        good = np.ones(len(self), dtype=bool)
        self.report.kinds.clear()
        for index in range(len(self)):
            if (broken := self._fault(index)) is not None:
                self.report.broken[broken.name] = broken.reason
                good[index] = False
            yield index + 1
        self._entries = self._entries[good]
        self.report.used = len(self)
        if not len(self):
            raise DataError(f"none of {len(good)} pairs can be used; {self.report.summary()}")

    def digest(self) -> str:
        """Returns a hash of the names of the files, relative to their folders, in order."""
        return hashlib.sha256(b"\0".join(self._entries.astype(bytes).ravel().tolist())).hexdigest()[:16]

    def part(self, indices: Sequence[int]) -> Pairs:
        """Returns a data set of these pairs only. A broken pair is replaced by another one of the part."""
        some = copy.copy(self)
        some._entries, some._epoch = self._entries[list(indices)], Epoch()
        some.report = copy.deepcopy(self.report)
        some.report.used = len(some)
        return some

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} pairs")
        index %= len(self)
        skipped: list[str] = []
        for other in range(index, index + min(MAX_BROKEN, len(self))):
            try:
                pair = self._read(other % len(self))
                with seeded(self.seed, self._epoch.get(), index):
                    tensors = transformed(self.transform, *pair)
                return self._item(tensors, self.name(other % len(self)), skipped)
            except BrokenFile as broken:
                skipped.append(broken.line)
                last = broken
        raise DataError(f"{len(skipped)} pairs in a row cannot be used; the last: {last}")


def kinds(*files: ImageFile | StructureFile | Tensor) -> list[str]:
    """Returns the storage formats of a pair's files, for reports."""
    return [
        f"images of {file.kind}" if isinstance(file, ImageFile) else f"{file.kind}s of {file.pixels.dtype}"
        for file in files
        if not isinstance(file, Tensor)
    ]
